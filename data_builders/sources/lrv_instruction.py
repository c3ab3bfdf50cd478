"""LRV-Instruction: GPT-4 questions about Visual Genome pictures, many about what is absent.

Record: `{"image_id", "question", "answer", "task"?}` in a list, which v1 wraps as `{"annotations":
[]}`. Use the files without coordinates (filter_cap1, filter_cap_more1) and the charts. `image_id`
is a Visual Genome number, or a file name for charts. The answers were written from captions, not
from pictures, so: "There is no mention of a teapot" is rewritten to "There is no teapot" (the
negative ones teach the model to say no and stay); answers that still speak of a description,
caption or bounding box ("no mention of the man's age" too), and rows with left-over coordinates,
are dropped. `clean: false` keeps them. Declarative instructions stay as they are, and so do several
questions about a picture, unless `group: N` joins up to N of them into one conversation. The set's
own evaluation file names 1,000 questions about 120 pictures: put it under `decontaminate.against`.

Usage:
    python -m data_builders.sources.lrv_instruction --annotations filter_cap1.json \\
        filter_cap_more1.json chart_release_update.json --images lrv/image lrv/chart_image \\
        --out builds/lrv
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from data_builders.annotations import ROWS, Batch, read_records
from data_builders.clean import text_of
from data_builders.images import ImageFinder
from data_builders.published import File, Folder
from data_builders.recipe import Strict
from data_builders.source import Draft, Source

# Only "a", "an" or "any" thing can be absent: "the colour of the car" or "the man's age" make no
# sentence with "there is no". What belongs to something ends where a preposition begins.
_BEFORE_PLACE = r"(?:(?!(?:in|on|at|by|near|with|under|from|next|behind|inside)\b)[\w-]+ ){0,6}"
_NO_MENTION = re.compile(
    r"\b(?P<there>there)(?: is| was| are|['\u2019]s) no mentions? of (?P<any>an?|any) "
    r"(?!(?:of|one|there|else|other|such|more|specific|particular|certain|lot|few|number|couple)\b)"
    rf"(?!{_BEFORE_PLACE}(?:[\w-]+['\u2019]|being\b|of (?:the|this|that|his|her|its|their)\b))"
    r"(?=(?P<thing>[\w-]+(?: [\w-]+){0,2}))",
    re.IGNORECASE,
)
_PLURALS = frozenset(["people", "children", "men", "women", "feet", "teeth", "mice", "geese"])
_OF_THE_PROMPT = re.compile(
    r"(?:\b(?:not|never)|n['\u2019]t) (?:explicitly |specifically |directly |clearly )?"
    r"(?:mention|specif|state)"
    r"|\b(?:(?:no|any|without) (?:(?:explicit|specific|direct|clear|further) )?mentions?\b"
    r"|not (?:provided|described|given) in the"
    r"|(?:the|this|these|dense|image|given|provided) (?:dense )?captions?\b|bounding[ -]?box"
    r"|(?:the|this|given|provided) (?:image )?descriptions?\b)",
    re.IGNORECASE,
)
# two of the four names one after the other, with their numbers or without
_COORDINATES = re.compile(
    r"\b(?:X|Y|Width|Height)\s?[:=]\s?(?:-?\d+(?:\.\d+)?)?[\s,;)(]{0,6}(?:and )?"
    r"\b(?:X|Y|Width|Height)\s?[:=]",
    re.IGNORECASE,
)


class _Group(list[Any]):
    """Rows of a file about one picture."""


class _Repeated(list[Any]):
    """A row that says what another one says."""


class LrvOptions(Strict):
    """Options.

    Attributes:
        group: How many questions about a picture become one conversation, at most; 1 leaves each
            alone.
        clean: Whether answers that speak of the prompt are rewritten or dropped, and left-over
            coordinates dropped.
    """

    group: int = Field(default=1, ge=1)
    clean: bool = True


class LrvInstruction(Source):
    """See the module."""

    name = "lrv_instruction"
    title = "LRV-Instruction, without coordinates, and its charts"
    license = "BSD-3-Clause (text by GPT-4), images CC-BY-4.0"
    home = "github.com/FuxiaoLiu/LRV-Instruction; drive.google.com/uc?id=… of its download.txt:"
    # Size: the file itself, in the repository; Google Drive tells none.
    files = (
        File("filter_cap1.json", 0, "id 1pWkxE2kqpys1VdwBi99ZXN6-XY5SqhwU; without coordinates"),
        File("filter_cap_more1.json", 0, "id 1NTxkuRPlvDn7aWaJpK_yb0p5r0cxPLNZ; the same"),
        File(
            "chart_release_update.json",
            0,
            "id 13j2U-ectsYGR92r6J5hPdhT8T5ezItHF; charts; 342,799 with both",
        ),
        File("evaluation_set.json", 102_000, "Evaluation/; 120 pictures held out, for --against"),
        File("filter_cap.json", 0, "line 5 of download.txt; v1 with coordinates, not advised"),
    )
    image_folders = (
        Folder(
            "lrv/image",
            "image.tar.gz, id 1k9MNV-ImEV9BYEOeLEIb4uGEUZjd3QbM, size not published; or "
            "Visual Genome's folders",
        ),
        Folder(
            "lrv/chart_image",
            "chart_image.zip, id 1Dey-undzW2Nl21CYLFSkP_Y4RrfRJkYd, size not published",
        ),
    )
    Options = LrvOptions

    def batches(self, finder: ImageFinder) -> Iterator[Batch]:
        """Rows, or groups of rows about one picture."""
        if self.options.group == 1:
            yield from super().batches(finder)
            return
        for path in self.inputs():
            groups: dict[str, dict[tuple[str, ...], Any]] = {}
            alone: list[Any] = []  # what is dropped is dropped alone, by its own name
            for batch in read_records(path, self.wrappers):
                for row in batch.records:
                    draft = self._row(row, Counter())
                    if not isinstance(draft, Draft):
                        alone.append(row)
                        continue
                    group = groups.setdefault(draft.images[0], {})
                    if group.setdefault(tuple(draft.turns), row) is not row:
                        alone.append(_Repeated([row]))
            joined: list[Any] = alone
            for rows in map(list, (group.values() for group in groups.values())):
                joined += (
                    _Group(rows[start : start + self.options.group])
                    for start in range(0, len(rows), self.options.group)
                )
            for start in range(0, len(joined), ROWS):
                yield Batch(path.name, start, joined[start : start + ROWS])

    def units(self, record: Any) -> int:
        """Rows of the file in a raw record."""
        return len(record) if type(record) is _Group else 1

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one row, or a group of rows; see `Source.draft`."""
        if type(record) is _Repeated:
            return "duplicate"
        if type(record) is not _Group:
            return self._row(record, notes)
        drafts = [self._row(row, notes) for row in record]
        turns = [turn for draft in drafts if isinstance(draft, Draft) for turn in draft.turns]
        first = drafts[0]
        assert isinstance(first, Draft)
        meta = first.meta if len(record) == 1 else {}
        return Draft(turns, first.images, first.style, first.orig_id, meta)

    def _row(self, record: Any, notes: Counter[str]) -> Draft | str:
        if type(record) is not dict:
            return "record_not_an_object"
        image = record.get("image_id")
        if type(image) is int or (type(image) is float and image.is_integer()):
            image = text_of(image)
        name = image.strip() if type(image) is str else image
        task = record.get("task")
        draft = self.short(
            record.get("question"),
            record.get("answer"),
            f"{name}.jpg" if type(name) is str and name and "." not in name else name,
            notes,
            orig_id=name,
            meta={"task": task} if type(task) is str else {},
        )
        return self._clean(draft, notes) if self.options.clean else draft

    def _clean(self, draft: Draft | str, notes: Counter[str]) -> Draft | str:
        """Rewrites or drops what speaks of the prompt, and drops coordinates."""
        if isinstance(draft, str):
            return draft
        turns = draft.turns
        rewritten = "mention" in turns[1] and _NO_MENTION.search(turns[1])
        if rewritten:
            turns[1] = _NO_MENTION.sub(_no, turns[1])
        if _OF_THE_PROMPT.search(turns[1]):
            return "answer_speaks_of_the_prompt"
        if any((":" in text or "=" in text) and _COORDINATES.search(text) for text in turns):
            return "coordinates_left_over"
        notes["no_mention_rewritten"] += bool(rewritten)
        return draft


def _no(match: re.Match[str]) -> str:
    several = match["any"].lower() == "any" and any(map(_plural, match["thing"].lower().split()))
    return f"{match['there']} {'are' if several else 'is'} no "


def _plural(word: str) -> bool:
    return word in _PLURALS or (word.endswith("s") and not word.endswith(("ss", "us", "is", "as")))


SOURCE = LrvInstruction

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("lrv_instruction")
