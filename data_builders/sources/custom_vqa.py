"""One's own pictures and questions: a table, JSON, or a folder whose file names are the labels.

Tables are CSV, TSV, JSON Lines, JSON or Parquet, by file ending. Columns are `image`, `question`,
`answer` unless `columns` says otherwise. Several questions about a picture are several rows; rows
that share a `conversation` value become the turns of one dialogue, in the order of `turn` where
that column is there, else of the file. In JSON, `turns` may hold a list of turns instead, and
`answer` a list of several people's answers (the most frequent one is taken); the layouts of TRL and
ms-swift (`messages` and a list of `images`) are read as they are, and pictures inside of a Parquet
table are written out beside it. Without annotations,
every picture below the image folders is a record whose answer is the file's name without its
extension, as in CogVLM's own captcha example, or with `label_from: folder` the name of its folder;
`label_pattern` picks a part of either. Rows whose `split` column says val or test stay out, unless
`splits` names them; a split of another name is a reason to drop. Cells of a CSV or TSV that a
spreadsheet would run as a formula (`=1+1`, `=cmd|' /C calc'!A0`) are dropped, since what was meant
is the formula's value; `clean: false` keeps them as text. Drops name the line of the table as
`_line`.

Usage:
    python -m data_builders.sources.custom_vqa --annotations questions.csv --images photos \\
        --out builds/mine --columns question=ask --columns answer=reply
    python -m data_builders.sources.custom_vqa --images captcha --question "CAPTCHA:" --out builds/c
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field, field_validator

from cogvlm_sft.errors import DataError
from data_builders.annotations import ROWS, Batch, read_records
from data_builders.clean import dialogue, human_answers, majority, rounds, text_of
from data_builders.images import ImageFinder
from data_builders.parquet import parquet_columns, parquet_rows, unpack_pictures
from data_builders.published import File, Folder
from data_builders.source import Draft, Source
from data_builders.splits import SplitOptions, split_named
from data_builders.tables import csv_rows

# What a spreadsheet runs: a call, a DDE link, a cell, arithmetic behind an equals sign.
_FORMULA = re.compile(
    r"\s*(?:[=@+\-].*\|.*!|[=@][A-Za-z_.]*\(|[+\-].*\b[A-Z]{2,}\("
    r"|=\s*\$?[A-Za-z]{1,3}\$?\d+\b|=\s*[-+.(\d].*[-+*/^&])"
)


class _Dialogue(list[Any]):
    """Rows of a file that are the turns of one conversation."""

    def __init__(self, rows: list[Any], unsorted: bool = False) -> None:
        super().__init__(rows)
        self.unsorted = unsorted

    def __reduce__(self) -> tuple[type, tuple[list[Any], bool]]:
        return _Dialogue, (list(self), self.unsorted)


Column = Literal[
    "image", "question", "answer", "conversation", "turn", "turns", "id", "style", "split"
]


class CustomOptions(SplitOptions):
    """Options of the custom source.

    Attributes:
        columns: Our column name to the file's, where they differ.
        delimiter: Of CSV files; a comma, and a tab for .tsv, unless given.
        question: The question of a labelled image folder, and of rows without one.
        label_from: Whether the file's name or its folder's is the label.
        label_pattern: Regular expression whose first group is the label in that name.
        clean: Whether rows are dropped whose cells a spreadsheet would run as a formula.
    """

    columns: dict[Column, str] = Field(default_factory=dict)
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    question: str = "CAPTCHA:"
    label_from: Literal["name", "folder"] = "name"
    label_pattern: str | None = None
    clean: bool = True

    @field_validator("label_pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"is not a regular expression: {error}") from None
            if not groups:
                raise ValueError("needs a group, such as ^([a-z]+)_")
        return value


class CustomVQA(Source):
    """See the module."""

    name = "custom_vqa"
    title = "your own pictures and questions"
    license = "yours"
    files = (
        File("*.csv, *.tsv, *.jsonl, *.json, *.parquet", 0, "columns image, question, answer"),
    )
    image_folders = (
        Folder("mine/images", "any folder; without annotations its file names are the answers"),
    )
    wrappers = ("data", "annotations", "questions")
    style = "vqa"
    needs_annotations = False
    Options = CustomOptions

    def unpack_pictures(self) -> list[Path]:
        """See `data_builders.parquet`."""
        tables = [path for path in self.entry.annotations if path.suffix.lower() == ".parquet"]
        folders = [unpack_pictures(path, self._pictured_by(parquet_columns(path)))
                   for path in tables]  # fmt: skip
        return [folder for folder in folders if folder is not None]

    def batches(self, finder: ImageFinder) -> Iterator[Batch]:
        """Rows, rows joined to dialogues, or the pictures of a labelled folder."""
        if not self.entry.annotations:
            yield from self._folder(finder)
            return
        for path in self.inputs():
            self.file = path.name
            rows = self._rows(path)
            joined = self.options.columns.get("conversation", "conversation")
            first = next(rows, None)
            if first is None:
                continue
            if any(type(row) is dict and joined in row for row in first.records):
                yield from self._joined(path, first, rows, joined)
            else:
                yield first
                yield from (_apart(path, batch, joined) for batch in rows)

    def units(self, record: Any) -> int:
        """Rows of the file in a raw record."""
        return len(record) if type(record) is _Dialogue else 1

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands a row, or several joined rows."""
        if type(record) is _Dialogue:
            notes["turn_not_a_number"] += record.unsorted and len(record) > 1
            return self._draft_rows(record, notes)
        if type(record) is not dict:
            return "record_not_an_object"
        if record.get("_malformed"):
            return str(record["_malformed"])
        if (held_out := self._held_out(record)) is not None:
            return held_out
        if self._formula(record):
            return "spreadsheet_formula"
        inner = next((record[key] for key in self._nested() if key in record), None)
        if inner is not None:
            turns = _turns(inner, notes)
        else:
            pair = self._pair(record)
            if isinstance(pair, str):
                return pair
            turns = rounds(list(pair), notes)
        if type(turns) is str:
            return turns
        assert isinstance(turns, list)
        return self._finish(turns, record)

    def _held_out(self, row: dict[str, Any]) -> str | None:
        """The reason why a row's split stays out; None where it enters.

        A file's name tells nothing here: whoever names a `test.csv` of their own means it.
        """
        word = text_of(row.get(self._column("split")))
        if word is None or not word.strip():
            return None
        split = split_named(word)
        if split is None:
            return "unknown_split"
        return None if split in self.options.splits else "held_out_split"

    def _formula(self, row: dict[str, Any]) -> bool:
        """Whether a cell of a table would be run by a spreadsheet."""
        if "_line" not in row or not self.options.clean:
            return False
        cells = (row.get(self._column("question")), row.get(self._column("answer")))
        return any(type(cell) is str and _FORMULA.match(cell) for cell in cells)

    def _column(self, key: Column) -> str:
        return self.options.columns.get(key, key)

    def _nested(self) -> tuple[str, ...]:
        """Names under which a record may hold all its turns."""
        return self._column("turns"), "messages", "conversations"

    def _pictured_by(self, names: Collection[str]) -> str:
        """The column of pictures: `image`, or `images` where that is there instead."""
        column = self._column("image")
        return (
            "images" if column == "image" and "image" not in names and "images" in names else column
        )

    def _pair(self, row: dict[str, Any]) -> tuple[str, str] | str:
        asked = row.get(self._column("question"))
        if asked is None and "question" in self.options.model_fields_set:
            asked = self.options.question
        question = text_of(asked)
        answer = row.get(self._column("answer"))
        if type(answer) is list:
            given = human_answers(answer)
            answer = majority(given) if given else None
        answered = text_of(answer)
        if question is None:
            return "empty_question" if asked is None else "question_not_a_text"
        if answered is None:
            return "empty_answer" if answer is None else "answer_not_a_text"
        return question, answered

    def _said(self, row: Any) -> tuple[str, str] | str:
        """The question and answer of a table's row, or the reason to drop it."""
        if type(row) is not dict:
            return "record_not_an_object"
        if row.get("_malformed"):
            return str(row["_malformed"])
        if (held_out := self._held_out(row)) is not None:
            return held_out
        if self._formula(row):
            return "spreadsheet_formula"
        pair = self._pair(row)
        if isinstance(pair, str):
            return pair
        problem = rounds(list(pair), Counter())
        return problem if isinstance(problem, str) else pair

    def _draft_rows(self, rows: list[Any], notes: Counter[str]) -> Draft | str:
        turns: list[str] = []
        images: set[str] = set()
        for row in rows:
            pair = self._said(row)
            if type(pair) is str:
                return pair
            turns.extend(pair)
            images.add(str(row.get(self._pictured_by(row)) or ""))
        if len(images - {""}) > 1:
            return "conversation_with_several_images"
        cleaned = rounds(turns, notes)
        assert isinstance(cleaned, list)
        return self._finish(cleaned, rows[0])

    def _finish(self, turns: list[str], row: dict[str, Any]) -> Draft | str:
        image = row.get(self._pictured_by(row))
        if type(image) is list:
            if len(image) > 1:  # CogVLM reads one picture
                return "several_images"
            image = image[0] if image else None
        if type(image) is dict:  # the image column of `datasets`, by its path
            image = image.get("path")
        if image is None or image == "":
            return "image_name_missing"
        if type(image) is int:
            image = str(image)
        if type(image) is not str:
            return "image_name_not_a_string"
        style = row.get(self._column("style")) or self.default_style
        if style not in ("chat", "vqa", "base"):
            return "unknown_style"
        identity = text_of(row.get(self._column("id")))
        return Draft(turns, [image.strip()], style, identity)

    def _folder(self, finder: ImageFinder) -> Iterator[Batch]:
        paths = iter(finder.files())
        pattern = self.options.label_pattern and re.compile(self.options.label_pattern)
        start = 0
        while chunk := list(islice(paths, ROWS)):
            rows = [self._labelled(path, pattern) for path in chunk]
            yield Batch("(image folder)", start, rows)
            start += len(rows)
        if start == 0:
            raise DataError(
                f"source {self.entry.name}: no annotations given and no picture found in "
                f"{', '.join(map(str, self.entry.images)) or 'the image root'}"
            )

    def _labelled(self, path: str, pattern: re.Pattern[str] | str | None) -> dict[str, Any]:
        file = PurePosixPath(path)
        label = file.stem if self.options.label_from == "name" else file.parent.name
        row = {self._column("image"): path, self._column("question"): self.options.question}
        if isinstance(pattern, re.Pattern):
            match = pattern.search(label)
            if match is None or match.group(1) is None:
                return {**row, "_malformed": "label_pattern_does_not_match"}
            label = match.group(1)
        return {**row, self._column("answer"): label}

    def _joined(self, path: Path, first: Batch, rest: Iterator[Batch], key: str) -> Iterator[Batch]:
        groups: dict[Any, list[Any]] = {}
        for batch in (first, *rest):
            for index, row in enumerate(batch.records, start=batch.start):
                value = row.get(key) if type(row) is dict else None
                alone = value is None or value == "" or type(value) not in (str, int)
                groups.setdefault(("row", index) if alone else (str(value),), []).append(row)
        order = self._column("turn")
        conversations: list[_Dialogue] = []
        for rows in groups.values():
            fit: list[Any] = []
            for row in rows:  # a row that is dropped is dropped alone, by its own name
                if type(self._said(row)) is str:
                    conversations.append(_Dialogue([row]))
                else:
                    fit.append(row)
            numbers = [_number(row.get(order)) for row in fit]
            numbered = None not in numbers
            if numbered:
                fit.sort(key=lambda row: _number(row[order]) or 0.0)
            told = any(order in row for row in fit)
            if fit:
                fit[0] = self._pictured(fit[0], rows)
                conversations.append(_Dialogue(fit, unsorted=told and not numbered))
        for start in range(0, len(conversations), ROWS):
            yield Batch(path.name, start, conversations[start : start + ROWS])

    def _pictured(self, row: dict[str, Any], rows: list[Any]) -> dict[str, Any]:
        """A conversation's first row, with the picture that any row of it may name."""
        column = self._pictured_by(row)
        named = (other[column] for other in rows if type(other) is dict and other.get(column))
        return row if row.get(column) else {**row, column: next(named, None)}

    def _rows(self, path: Path) -> Iterator[Batch]:
        ending = path.suffix.lower()
        wanted: list[Column] = ["image", "answer"]
        if "question" not in self.options.model_fields_set:
            wanted.append("question")
        needed: dict[str, str] = {key: self._column(key) for key in wanted}
        if ending in (".csv", ".tsv"):
            between = self.options.delimiter or ("\t" if ending == ".tsv" else ",")
            rows = csv_rows(path, between, needed)
        elif ending == ".parquet":
            found = parquet_columns(path)
            column = needed["image"] = self._pictured_by(found)
            if set(self._nested()) & set(found):
                needed = {"image": column}
            rows = parquet_rows(path, needed, pictures=column)
        elif ending in (".json", ".jsonl", ".ndjson"):
            yield from read_records(path, self.wrappers)
            return
        else:
            raise DataError(
                f"{path}: cannot tell its format; name it .csv, .tsv, .jsonl, .json or .parquet"
            )
        start = 0
        while chunk := list(islice(rows, ROWS)):
            yield Batch(path.name, start, chunk)
            start += len(chunk)


def _apart(path: Path, batch: Batch, joined: str) -> Batch:
    """The batch, unless a row of it belongs to a conversation though none before did."""
    for index, row in enumerate(batch.records, start=batch.start):
        if type(row) is dict and joined in row:
            raise DataError(
                f"{path}: record {index} has {joined!r}, which no record before it has; give it to "
                "every record, empty where a row stands alone"
            )
    return batch


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number == number else None


def _turns(inner: Any, notes: Counter[str]) -> list[str] | str:
    """The turns of a nested list: objects with a question and an answer, pairs, or messages."""
    if type(inner) is not list or not inner:
        return "turns_missing"
    if type(inner[0]) is dict and ("role" in inner[0] or "from" in inner[0]):
        return dialogue(inner, notes)
    flat: list[str] = []
    for turn in inner:
        if type(turn) is dict:
            turn = [turn.get("question"), turn.get("answer")]
        if type(turn) is not list or len(turn) != 2:
            return "turn_not_a_question_and_answer"
        question, answer = map(text_of, turn)
        if question is None or answer is None:
            return "text_not_a_string"
        flat += [question, answer]
    return rounds(flat, notes)


SOURCE = CustomVQA

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("custom_vqa")
