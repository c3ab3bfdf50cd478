"""`report.html`: one page, no outside files, that shows a person what a build holds.

Rendered by jinja2 with escaping on, since questions and answers are foreign text. Pictures are
small JPEGs inside the page. Nothing in it depends on time or machine.
"""

import base64
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from jinja2 import Environment
from PIL import Image, ImageOps

from data_builders.image_check import ImageFacts
from data_builders.mix import Ledger

SAMPLES = 12
_TWINS = 6
_COLOURS = ("#2f6f8f", "#c8773a", "#5b8c5a", "#8a5a8c", "#b0a03a", "#5a6b8c", "#a34a4a", "#4aa39a")

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Build report</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root{--ink:#1d2429;--soft:#66727a;--line:#dfe4e7;--paper:#fbfcfc;--accent:#2f6f8f}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0}
main{max-width:1080px;margin:0 auto;padding:2rem 1.2rem 4rem}
h1{font-size:1.9rem;margin:0}h2{font-size:1.25rem;margin:2.6rem 0 .8rem}
.lead{color:var(--soft);margin:.3rem 0 1.4rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.8rem}
.card{background:#fff;border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem}
.card b{display:block;font-size:1.5rem}.card span{color:var(--soft);font-size:.85rem}
.share{display:flex;height:26px;border-radius:6px;overflow:hidden;margin:.2rem 0 1rem}
table{border-collapse:collapse;width:100%;background:#fff;font-size:.92rem}
th,td{padding:.4rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th:first-child,td:first-child,td.text,th.text{text-align:left}th{color:var(--soft);font-weight:600}
.dot{display:inline-block;width:.7rem;height:.7rem;border-radius:3px;margin-right:.45rem}
code{font-size:.8rem;color:var(--soft);word-break:break-word}
details{background:#fff;border:1px solid var(--line);border-radius:8px;margin:.4rem 0}
details{padding:.4rem .8rem}
summary{cursor:pointer}summary b{float:right}
.bars{display:flex;align-items:flex-end;gap:3px;height:120px}
.bars div{flex:1;background:var(--accent);border-radius:3px 3px 0 0;min-height:1px}
.labels{display:flex;gap:3px;color:var(--soft);font-size:.72rem}
.labels span{flex:1;text-align:center}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:1.4rem}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(310px,1fr));gap:1rem}
.sample{background:#fff;border:1px solid var(--line);border-radius:10px;overflow:hidden}
.sample img{width:100%;max-height:230px;object-fit:contain;background:#eef1f2;display:block}
.sample .in{padding:.7rem .9rem}.q{font-weight:600;margin:.5rem 0 .1rem;white-space:pre-wrap}
.a{margin:0;white-space:pre-wrap}.id{color:var(--soft);font-size:.75rem;word-break:break-all}
.pair{display:flex;gap:.6rem;align-items:center;margin:.5rem 0}.pair img{height:110px}
</style></head><body><main>
<h1>Build report</h1>
<p class="lead">seed {{ m.seed }} · image root <code>{{ m.image_root }}</code> ·
licences {{ m.licenses | join(", ") }}</p>
<div class="cards">
{% for label, value in cards %}<div class="card"><b>{{ value }}</b><span>{{ label }}</span></div>
{% endfor %}</div>
<h2>Sources</h2>
<div class="share">{% for row in rows %}<div title="{{ row.name }}"
 style="width:{{ row.share }}%;background:{{ row.colour }}"></div>{% endfor %}</div>
<table><tr><th>source</th><th>read</th><th>kept</th><th>dropped</th><th>written</th><th>share</th>
<th>questions</th><th>characters an answer</th><th class="text">licence</th></tr>
{% for row in rows %}<tr><td><span class="dot" style="background:{{ row.colour }}"></span>{{
 row.name }}</td><td>{{ row.read }}</td><td>{{ row.kept }}</td><td>{{ row.gone }}</td>
<td>{{ row.written }}</td>
<td>{{ row.share }} %</td><td>{{ row.questions }}</td><td>{{ row.mean }}</td>
<td class="text">{{ row.license }}</td></tr>{% endfor %}</table>
<h2>Dropped and repaired</h2>
{% for row in rows %}{% for reason, n, examples in row.drops %}<details><summary>{{ row.name }}:
{{ reason }} <b>{{ n }}</b></summary>{% for e in examples %}<p><code>{{ e.file }} #{{ e.index }}:
{{ e.excerpt }}</code></p>{% endfor %}</details>{% endfor %}
{% for name, n in row.repairs %}<details><summary>{{ row.name }}: repaired, {{ name }}
<b>{{ n }}</b></summary></details>{% endfor %}{% endfor %}
{% if m.held_out %}<h2>Held-out pictures</h2><table><tr><th>set</th><th>pictures</th>
<th>records</th><th>mode</th></tr>{% for name, o in m.held_out.items() %}<tr>
<td>{{ name }}</td><td>{{ o.pictures }}</td><td>{{ o.records }}</td><td>{{ o.mode }}</td>
</tr>{% endfor %}</table>{% endif %}
<h2>Shape</h2><div class="charts">{% for title, bars in charts %}<div><b>{{ title }}</b>
<div class="bars">{% for label, n, height in bars %}<div style="height:{{ height }}%"
 title="{{ label }}: {{ n }}"></div>{% endfor %}</div><div class="labels">{% for label, n, h in bars
%}<span>{{ label }}</span>{% endfor %}</div></div>{% endfor %}</div>
{% if twins %}<h2>Near-duplicates taken out</h2>{% for a, b, ta, tb in twins %}<div class="pair">
<img src="{{ a }}" alt="kept"><img src="{{ b }}" alt="dropped"><code>{{ ta }} kept, {{ tb }} dropped
</code></div>{% endfor %}{% endif %}
<h2>Samples</h2><div class="samples">{% for s in samples %}<div class="sample">
{% for picture in s.pictures %}<img src="{{ picture }}" alt="">{% endfor %}<div class="in">
<div class="id">{{ s.id }} · {{ s.style }}</div>{% for role, text in s.turns %}<p class="{{
 'q' if role == 'user' else 'a' }}">{{ text }}</p>{% endfor %}</div></div>{% endfor %}</div>
</main></body></html>
"""


def write_report(
    path: Path,
    manifest: dict[str, Any],
    ledger: Ledger,
    records: Any,
    facts: dict[int, ImageFacts],
    twins: list[tuple[int, int]],
    image_root: Path,
    tokenizer: Path | None = None,
) -> None:
    """Writes the page.

    Args:
        path: The file.
        manifest: Content of the manifest.
        ledger: The records.
        records: Record numbers in the order of the build.
        facts: What was found out about each picture number.
        twins: Pairs (kept record, dropped record) of near-duplicates.
        image_root: Where the pictures are.
    """
    page = Environment(autoescape=True).from_string(_PAGE)
    path.write_text(
        page.render(
            m=manifest,
            cards=_cards(manifest),
            rows=_rows(manifest),
            charts=_charts(ledger, records, facts),
            samples=_samples(ledger, records, image_root),
            twins=_twins(ledger, twins, image_root),
        ),
        encoding="utf-8",
    )


def _cards(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    totals = manifest["totals"]
    return [
        ("conversations", f"{totals['conversations']:,}"),
        ("questions", f"{totals['questions']:,}"),
        ("records read", f"{totals['read']:,}"),
        ("records dropped", f"{totals['dropped']:,}"),
        ("pictures", f"{manifest['pictures']['distinct']:,}"),
    ]


def _rows(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    total = max(1, manifest["totals"]["conversations"])
    rows = []
    for number, (name, row) in enumerate(manifest["sources"].items()):
        examples = manifest["examples"][name]
        rows.append(
            {
                "name": name,
                "colour": _COLOURS[number % len(_COLOURS)],
                "read": f"{row['read']:,}",
                "kept": f"{row['kept']:,}",
                "gone": f"{sum(row['dropped'].values()):,}",
                "written": f"{row['conversations']:,}",
                "questions": f"{row['questions']:,}",
                "mean": f"{row['answer_characters'] / max(1, row['questions']):.1f}",
                "share": f"{100 * row['conversations'] / total:.1f}",
                "license": row["license"],
                "drops": [
                    (reason, f"{n:,}", [e for e in examples if e["reason"] == reason])
                    for reason, n in row["dropped"].items()
                ],
                "repairs": [(k, f"{v:,}") for k, v in row["repaired"].items()],
            }
        )
    return rows


def _charts(ledger: Ledger, records: Any, facts: dict[int, ImageFacts]) -> list[Any]:
    pairs = ledger.columns["pairs"][records]
    lengths = ledger.columns["answer_chars"][records] / np.maximum(1, pairs)
    charts = [
        ("Questions a conversation", _bars(pairs, [1, 2, 3, 4, 5, 6, 8, 11, 16])),
        ("Characters an answer", _bars(lengths, [0, 5, 10, 20, 50, 100, 200, 500, 1000, 2000])),
    ]
    sides = np.array([max(f.width, f.height) for f in facts.values() if f.reason is None])
    if len(sides):
        charts.append(
            ("Longer picture side, pixels", _bars(sides, [0, 64, 128, 256, 512, 1024, 2048]))
        )
    return charts


def _bars(values: Any, edges: list[int]) -> list[tuple[str, str, float]]:
    counts, _ = np.histogram(values, [*edges, np.inf])
    top = max(1, int(counts.max()))
    labels = [*map(str, edges[:-1]), f"{edges[-1]}+"]
    return [
        (label, f"{count:,}", round(100 * int(count) / top, 2))
        for label, count in zip(labels, counts, strict=True)
    ]


def _samples(ledger: Ledger, records: Any, root: Path) -> list[dict[str, Any]]:
    """The first conversations of every source in turn, in the order of the build."""
    of_source = ledger.columns["source"][records]
    share = max(1, SAMPLES // max(1, len(np.unique(of_source))))
    chosen = [r for n in np.unique(of_source) for r in records[of_source == n][:share]]
    samples = []
    for record in chosen:
        line = orjson.loads(ledger.line(int(record)))
        samples.append(
            {
                "id": line["id"],
                "style": line["style"],
                "turns": [(m["role"], m["content"]) for m in line["messages"][:6]],
                "pictures": [p for p in (_thumbnail(root / i) for i in line["images"][:2]) if p],
            }
        )
    return samples


def _twins(ledger: Ledger, twins: list[tuple[int, int]], root: Path) -> list[Any]:
    shown = []
    for kept, gone in twins[:_TWINS]:
        names = [ledger.pictures[ledger.pictures_of(record)[0]] for record in (kept, gone)]
        small = [_thumbnail(root / name) for name in names]
        if all(small):
            shown.append((*small, *names))
    return shown


def _thumbnail(path: Path) -> str:
    """A data URI; empty where there is no picture to show."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            if image.width * image.height > 89_000_000:
                return ""
            small = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception:
        return ""  # missing, or broken in any of the ways Pillow reports: the page goes without
    small.thumbnail((360, 360))
    flat = Image.new("RGB", small.size, "white")
    flat.paste(small, mask=small.getchannel("A"))
    stream = io.BytesIO()
    flat.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
