"""`report.html`: one page, no outside files, that shows a person what a build holds.

Counts come from the manifest. Texts are looked at in a sample of conversations, evenly taken over
the build, whose order is random already; picture sizes are those of every checked picture. Rendered
by jinja2 with escaping on, since questions and answers are foreign text; the page carries no
script, its own policy forbids any, and its pictures are small JPEGs inside it. Nothing in it
depends on time or machine.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cogvlm_sft.conversation import resolve_image, strip_marker
from cogvlm_sft.errors import DataError
from data_builders.image_check import ImageFacts
from data_builders.mix import Ledger
from data_builders.report_charts import by_count, histogram, ranking, size_grid
from data_builders.report_words import explain, explain_kind, explain_repair
from data_builders.thumbnail import Box, boxes_in, thumbnail
from data_builders.token_count import counter_of

SAMPLES = 24
READ = 20_000
_TWINS = 8
_TURNS = 6
_BOXES = 12
_TEXT = 700
_COLOURS = ("#2b6cb0", "#b7622c", "#3d8361", "#7c5295", "#94791f", "#4f6272", "#a8434f", "#2c8c89",
            "#8a6d5a", "#5d6bb5")  # fmt: skip
_QUESTIONS = [1, 2, 3, 4, 5, 6, 8, 11, 16]
_LENGTHS = [0, 5, 10, 20, 50, 100, 200, 500, 1000]
_SIDES = [0, 64, 128, 256, 384, 512, 768, 1024, 2048]


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
        tokenizer: Counts the tokens of answers; characters are counted without one.

    Raises:
        DataError: The tokenizer cannot be read.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    sources = list(manifest["sources"])
    page = environment.get_template("report.html.jinja").render(
        m=manifest,
        headline=_headline(manifest),
        cards=_cards(manifest),
        rows=_rows(manifest),
        drops=_drops(manifest),
        dropped_note=_dropped_note(manifest),
        repairs=[
            (source, explain_repair(name), f"{n:,}")
            for source, row in manifest["sources"].items()
            for name, n in row["repaired"].items()
        ],
        pictures=_pictures(manifest, facts),
        samples=_samples(ledger, records, image_root),
        samples_note="The first conversations of each source, in the order of the build.",
        sample_sources=[name for name in sources if manifest["sources"][name]["conversations"]],
        twins=_twins(ledger, twins, facts, image_root),
        twins_note=_twins_note(len(twins)),
        **_texts(ledger, records, tokenizer),
    )
    path.write_text(page, encoding="utf-8")


def _headline(manifest: dict[str, Any]) -> str:
    totals = manifest["totals"]
    count, sources = totals["conversations"], len(manifest["sources"])
    parts = f"{count:,} conversation{'s' * (count != 1)}"
    return f"{parts} from {sources} source{'s' * (sources != 1)}"


def _cards(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    totals = manifest["totals"]
    lost = totals["dropped"] / max(1, totals["read"])
    return [
        ("conversations", f"{totals['conversations']:,}"),
        ("questions with answers", f"{totals['questions']:,}"),
        ("different pictures", f"{manifest['pictures']['distinct']:,}"),
        ("records read", f"{totals['read']:,}"),
        (f"dropped, {100 * lost:.1f} % of what was read", f"{totals['dropped']:,}"),
    ]


def _rows(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    total = max(1, manifest["totals"]["conversations"])
    return [
        {
            "name": name,
            "colour": _COLOURS[number % len(_COLOURS)],
            "read": f"{row['read']:,}",
            "kept": f"{row['kept']:,}",
            "gone": f"{sum(row['dropped'].values()):,}",
            "written": f"{row['conversations']:,}",
            "questions": f"{row['questions']:,}",
            "text_only": f"{row['text_only']:,}",
            "part": row["conversations"],
            "share": f"{100 * row['conversations'] / total:.1f}",
            "wide": row["conversations"] / total > 0.06 + 0.01 * len(name),
            "license": row["license"],
            "commercial": row["commercial_use"],
        }
        for number, (name, row) in enumerate(manifest["sources"].items())
    ]


def _drops(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Every reason of every source, the most frequent first."""
    counted = [
        (n, source, reason)
        for source, row in manifest["sources"].items()
        for reason, n in row["dropped"].items()
    ]
    most = max((n for n, _, _ in counted), default=1)
    return [
        {
            "says": explain(reason),
            "reason": reason,
            "source": source,
            "count": f"{n:,}",
            "width": round(100 * n / most, 1),
            "examples": [e for e in manifest["examples"][source] if e["reason"] == reason],
        }
        for n, source, reason in sorted(counted, key=lambda row: (-row[0], row[1], row[2]))
    ]


def _dropped_note(manifest: dict[str, Any]) -> str:
    totals = manifest["totals"]
    if not totals["dropped"]:
        return f"Nothing was dropped: all {totals['read']:,} records are in."
    return (
        f"{totals['read']:,} records read = {totals['kept']:,} kept + {totals['dropped']:,} "
        "dropped, each for one of these reasons. Open a line for examples."
    )


def _texts(ledger: Ledger, records: Any, tokenizer: Path | None) -> dict[str, Any]:
    """What the texts of a sample of conversations look like."""
    chosen = records[:: max(1, -(-len(records) // READ))]
    questions: list[str] = []
    answers: list[str] = []
    for record in chosen:
        for message in orjson.loads(ledger.line(int(record)))["messages"]:
            text = message["content"]
            if message["role"] == "user":
                questions.append(strip_marker(text))
            else:
                answers.append(text)
    unit, lengths = counter_of(tokenizer)(answers)
    whole = len(chosen) == len(records)
    sample = "all" if whole else f"{len(chosen):,} evenly chosen"
    openings = Counter(" ".join(text.split()[:2]) for text in questions)
    charts = [
        histogram("Questions a conversation", ledger.columns["pairs"][records], _QUESTIONS),
        histogram(f"{unit} an answer", lengths, _LENGTHS),
    ]
    return {
        "charts": charts,
        "openings": ranking(openings, len(questions)),
        "answers": ranking(Counter(answers), len(answers)),
        "shape_note": f"Questions are counted in all conversations; texts are those of {sample} "
        f"conversations, {len(answers):,} answers.",
    }


def _pictures(manifest: dict[str, Any], facts: dict[int, ImageFacts]) -> dict[str, Any] | None:
    """Sizes and kinds of the usable pictures; None where pictures were not looked at."""
    usable = [fact for _, fact in sorted(facts.items()) if fact.reason is None]
    if not usable:
        return None
    width = np.array([fact.width for fact in usable])
    height = np.array([fact.height for fact in usable])
    counted = manifest["pictures"]
    return {
        "note": f"{counted['checked']:,} pictures were decoded to the last byte, "
        f"{len(usable):,} of them are usable.",
        "sides": histogram("Longer side, pixels", np.maximum(width, height), _SIDES),
        **size_grid(width, height),
        "kinds": [(kind, f"{n:,}") for kind, n in by_count(counted["kinds"])],
        "odd": [
            (explain_kind(kind), f"{n:,}") for kind, n in by_count(counted["converted_when_read"])
        ],
    }


def _samples(ledger: Ledger, records: Any, root: Path) -> list[dict[str, Any]]:
    """The first conversations of every source in turn, in the order of the build."""
    of_source = ledger.columns["source"][records]
    present = np.unique(of_source)
    share = max(2, SAMPLES // max(1, len(present)))
    samples = []
    for place, number in enumerate(present):
        for record in records[of_source == number][:share]:
            line = orjson.loads(ledger.line(int(record)))
            turns = [
                (m["role"], _short(strip_marker(m["content"]), _TEXT)) for m in line["messages"]
            ]
            boxes = boxes_in([m["content"] for m in line["messages"]])[:_BOXES]
            samples.append(
                {
                    "id": line["id"],
                    "style": line["style"],
                    "place": place,
                    "turns": turns[:_TURNS],
                    "more": len(turns[_TURNS:]),
                    "pictures": list(
                        filter(None, (_shown(root, name, boxes) for name in line["images"][:2]))
                    ),
                }
            )
    return samples


def _shown(root: Path, name: str, boxes: Sequence[Box]) -> str:
    """A picture as a data URI; empty where it is missing, or a link that leads out of the root.

    Builds that look at no pictures (`images.check: false`) have not found that out before.
    """
    try:
        return thumbnail(resolve_image(root, name), boxes)
    except DataError:
        return ""


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length].rstrip() + "…"


def _twins(
    ledger: Ledger, twins: list[tuple[int, int]], facts: dict[int, ImageFacts], root: Path
) -> list[dict[str, Any]]:
    shown = []
    for pair in twins[:_TWINS]:
        numbers = [ledger.pictures_of(record)[0] for record in pair]
        first, second = (facts[number].phash or 0 for number in numbers)
        messages = orjson.loads(ledger.line(pair[0]))["messages"]
        texts = " — ".join(strip_marker(message["content"]) for message in messages[:2])
        shown.append(
            {
                "bits": (first ^ second).bit_count(),
                "text": _short(texts, 200),
                "sides": [
                    {
                        "kept": side == 0,
                        "name": ledger.pictures[numbers[side]],
                        "size": f"{facts[numbers[side]].width} by {facts[numbers[side]].height}",
                        "picture": thumbnail(root / ledger.pictures[numbers[side]]),
                        "source": ledger.sources[int(ledger.columns["source"][pair[side]])],
                    }
                    for side in (0, 1)
                ],
            }
        )
    return shown


def _twins_note(count: int) -> str:
    shown = f" The first {_TWINS} are shown." if count > _TWINS else ""
    return (
        f"{count:,} conversations had the same words as another one, about a picture that looks "
        f"the same.{shown} Such a picture with other words is kept."
    )
