"""What a run found, for a program (`report.json`) and for a person (`report.html`).

The page is one file without scripts or links to elsewhere: every figure with its interval and the
published ones under their protocol, how the model was asked, and the worst cases with their
pictures, the model's boxes and the true ones drawn on them.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cogvlm_sft.checkpoint.staging import write_text
from cogvlm_sft.data.pictures import read_picture
from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.drawing import PREDICTED, TRUE, draw_boxes, for_screen
from cogvlm_sft.evaluation.metrics.boxes import parse_boxes

_SIDE = 320

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fbfbf9; margin: 0 auto;
       max-width: 1080px; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p.under { color: #5b6672; margin: .2rem 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .3rem .9rem .3rem 0; text-align: left;
       vertical-align: top; border-bottom: 1px solid #e4e4de; }
.wide { overflow-x: auto; }
th { font-weight: 600; color: #5b6672; } td.number { font-variant-numeric: tabular-nums;
       text-align: right; white-space: nowrap; }
dl { display: grid; grid-template-columns: 9rem minmax(0, 1fr); gap: .2rem .8rem; margin: .5rem 0;
     overflow-wrap: anywhere; }
a { color: #1f5673; }
dt { color: #5b6672; } dd { margin: 0; }
.bar { position: relative; width: 12rem; height: .6rem; background: #ececE6; border-radius: 3px;
       margin-top: .45rem; }
.bar i { position: absolute; top: 0; bottom: 0; background: #a9c6d8; border-radius: 3px; }
.bar b { position: absolute; top: -.15rem; bottom: -.15rem; width: 2px; background: #1f5673; }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr));
         gap: 1rem; }
summary { font-weight: 600; cursor: pointer; margin: 1.5rem 0 .5rem; }
.case { background: #fff; border: 1px solid #e4e4de; border-radius: 6px; padding: .7rem;
        overflow-wrap: anywhere; }
.case img { max-width: 100%; display: block; margin: 0 auto .5rem; image-rendering: auto; }
.case small { color: #5b6672; }
@media (max-width: 600px) { body { padding: 1rem; } dl { grid-template-columns: minmax(0, 1fr); }
  dd { margin-bottom: .4rem; } .bar { width: 5rem; } }
.model { color: PREDICTED; } .truth { color: TRUE; }
""".replace("PREDICTED", "#b8401f").replace("TRUE", "#0b7a78")


def write_report(folder: Path, reports: Sequence[dict[str, Any]]) -> Path:
    """Writes report.json and report.html.

    Args:
        folder: Made if missing.
        reports: One of each task, as `evaluate_model` returns.

    Returns:
        The page.
    """
    content: Any = reports[0] if len(reports) == 1 else {"tasks": list(reports)}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_text(folder / "report.json", text)
    return write_text(folder / "report.html", page(reports))


def page(reports: Sequence[dict[str, Any]]) -> str:
    """The HTML of `write_report`."""
    names = ", ".join(report["title"] for report in reports)
    several = len(reports) > 1
    body = _overview(reports) if several else ""
    body += "".join(_section(report, n, folded=several) for n, report in enumerate(reports))
    checkpoint = html.escape(str(reports[0].get("checkpoint") or "a model in memory"))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(names)}</title><style>{_STYLE}</style>"
        f"<h1>Evaluation</h1><p class=under>{checkpoint}</p>{body}</html>\n"
    )


def _overview(reports: Sequence[dict[str, Any]]) -> str:
    """The first figure of each task, for a page of several."""
    rows = []
    for number, report in enumerate(reports):
        link = f'<a href="#task-{number}">{html.escape(report["title"])}</a>'
        for figure in report["figures"][:1] or [None]:
            rows.append(
                f"<tr><td>{link}</td><td class=number>{_counted(report)}</td>"
                + (_value(figure) if figure else "<td colspan=4>no score</td>")
                + "</tr>"
            )
    head = "<th>task</th><th>of</th><th>figure</th><th>ours</th><th>95 % interval</th><th>"
    return f"<div class=wide><table><tr>{head}</th></tr>{''.join(rows)}</table></div>"


def _section(report: dict[str, Any], number: int, *, folded: bool) -> str:
    title = html.escape(report["title"])
    first = "the first " if report.get("limit") else ""
    parts = [f'<h2 id="task-{number}">{title}</h2><p class=under>{first}{_counted(report)}</p>']
    if report["figures"]:
        parts.append(_figures(report["figures"]))
    else:
        parts.append(
            "<p>No score: the true answers are hidden, or a judge is needed. The answers are in "
            "the official format beside this page.</p>"
        )
    parts += [f"<p class=under>{html.escape(note)}</p>" for note in report["notes"]]
    if report["published"]:
        parts.append(_published(report["published"], report["figures"]))
    parts.append("<h3>How it was asked</h3><dl>")
    for label in ("prompt", "decoding", "weights", "post_processing", "metric"):
        parts.append(f"<dt>{label.replace('_', '-')}</dt><dd>{html.escape(report[label])}</dd>")
    files = html.escape(", ".join(report["annotations"]))
    parts.append(f"<dt>annotations</dt><dd>{files}</dd></dl>")
    if report["worst"]:
        cases = "".join(_case(row) for row in report["worst"])
        opened = "" if folded else " open"
        parts.append(
            f"<details{opened}><summary>Worst cases</summary>"
            f"<div class=cases>{cases}</div></details>"
        )
    return "".join(parts)


def _counted(report: dict[str, Any]) -> str:
    unit = report.get("unit", "question")
    return f"{report['count']:,} {unit}{'' if report['count'] == 1 else 's'}"


def _figures(figures: Sequence[dict[str, Any]]) -> str:
    rows = "".join(f"<tr>{_value(figure)}</tr>" for figure in figures)
    head = "<tr><th>figure</th><th>ours</th><th>95 % interval</th><th></th></tr>"
    return f"<div class=wide><table>{head}{rows}</table></div>"


def _value(figure: dict[str, Any]) -> str:
    """Cells of a figure: its name, value, interval, and a bar where it is a share."""
    low, high = figure["interval"]
    value = figure["value"]
    bar = ""
    if figure["share"]:
        bar = (
            f'<div class=bar><i style="left:{low:.1f}%;width:{max(0.0, high - low):.1f}%"></i>'
            f'<b style="left:{value:.1f}%"></b></div>'
        )
    return (
        f"<td>{html.escape(figure['name'])}</td><td class=number>{value:.2f}</td>"
        f"<td class=number>{low:.2f} to {high:.2f}</td><td>{bar}</td>"
    )


def _published(figures: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> str:
    values = {figure["name"]: f"{figure['value']:.2f}" for figure in ours}
    rows = "".join(
        f"<tr><td>{html.escape(one['figure'])}</td>"
        f"<td class=number>{values.get(one['figure'], '')}</td>"
        f"<td class=number>{one['value']:.2f}</td>"
        f"<td>{html.escape(one['model'])}</td><td>{html.escape(one['source'])}</td>"
        f"<td>{html.escape(one['protocol'])}</td></tr>"
        for one in figures
    )
    head = (
        "<tr><th>figure</th><th>ours</th><th>published</th><th>model</th><th>source</th>"
        "<th>protocol</th></tr>"
    )
    return f"<h3>Published figures</h3><div class=wide><table>{head}{rows}</table></div>"


def _case(row: dict[str, Any]) -> str:
    boxes = [(box, TRUE, "true") for box in parse_boxes(row["answer"])]
    boxes += [(box, PREDICTED, "model") for box in parse_boxes(row["prediction"])]
    pictures = []
    for path in row["images"]:
        try:
            picture = read_picture(Path(path), row["id"])
        except DataError:
            pictures.append("<p><small>the picture is no longer there</small></p>")
            continue
        shown = draw_boxes(for_screen(picture, _SIDE), boxes)
        pictures.append(f'<img alt="" src="{_data_url(shown)}">')
    asked = html.escape(row["question"]) or "<i>no words</i>"
    said = html.escape(row["prediction"]) or "<i>nothing</i>"
    return (
        f"<div class=case>{''.join(pictures)}<div>{asked}</div>"
        f"<div class=model>model: {said}</div><div class=truth>true: {html.escape(row['answer'])}"
        f"</div><small>{html.escape(row['id'])}, score {row['score']:.2f}</small></div>"
    )


def _data_url(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
