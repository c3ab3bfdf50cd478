"""Question sets in VQA's form: questions in one file, answers in another, joined by question id.

Notable choices: the questions wait in memory and the answers stream past them; what finds no
partner on either side, an id that occurs twice among the questions, and a pair whose halves name
different pictures are records too, dropped by name. The split is read from both files, from their
`data_subtype` and their names; where these differ the one that is held out counts. It decides the
pictures' names. Question files, which say so in their names, may stand among the answer files.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from cogvlm_sft.errors import DataError
from data_builders.annotations import ROWS, Batch, read_head, read_records
from data_builders.clean import human_answers, majority, text_of
from data_builders.images import ImageFinder
from data_builders.source import Draft, Source
from data_builders.splits import SplitOptions, split_named

_SPLIT = re.compile(r"(?<![a-z])(?:train|val|test)\d{4}")


class JoinedOptions(SplitOptions):
    """Options of question sets in two files.

    Attributes:
        questions: The question files; those listed among the annotations need not be named.
    """

    questions: list[Path] = Field(default_factory=list)

    @field_validator("questions", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value


class JoinedVqa(Source):
    """A question set in VQA's two-file form, about COCO pictures."""

    wrappers = ("annotations",)
    style = "vqa"
    Options = JoinedOptions

    def inputs(self) -> list[Path]:
        """Answer files and question files."""
        if not self._questions():
            raise DataError(
                f"source {self.entry.name}: no questions given; answers alone hold no question "
                f"text. Set `questions` to {self.files[0].name}"
            )
        if not self._answers():
            raise DataError(
                f"source {self.entry.name}: no answers given; it reads {self.files[1].name} beside "
                "the questions"
            )
        return sorted({*self._answers(), *self._questions()}, key=lambda p: (p.name, str(p)))

    def _questions(self) -> list[Path]:
        listed = {path for path in super().inputs() if "questions" in path.name.lower()}
        return sorted(listed.union(self.options.questions))

    def _answers(self) -> list[Path]:
        questions = self._questions()
        return [path for path in super().inputs() if path not in questions]

    def batches(self, finder: ImageFinder) -> Iterator[Batch]:
        """Answers, each with its question; then the questions that found no answer."""
        asked: dict[str, tuple[Any, Any, str]] = {}
        left: list[dict[str, Any]] = []
        for path in self._questions():
            split = self._split(path)
            for batch in read_records(path, ("questions",)):
                for record in batch.records:
                    key = _question_id(record)
                    if key is None:
                        left.append({"problem": "question_without_id", "question": record})
                    elif key in asked:
                        left.append({"problem": "duplicate_question_id", "question": record})
                    else:
                        asked[key] = record.get("question"), record.get("image_id"), split
        answered: set[str] = set()
        for path in self._answers():
            split = self._split(path)
            for batch in read_records(path, self.wrappers):
                rows = []
                for answer in batch.records:
                    key = _question_id(answer)
                    row: dict[str, Any] = {"answer": answer, "split": split or "train2014"}
                    if key is not None and key in asked:
                        answered.add(key)
                        row["question"], row["asked_about"], other = asked[key]
                        row["split"] = _stricter(split, other) or "train2014"
                    else:
                        row["problem"] = "annotation_without_question"
                    if not isinstance(answer, dict):
                        row["problem"] = "record_not_an_object"
                    else:
                        row["image"] = self.picture(answer.get("image_id"), row["split"], finder)
                    rows.append(row)
                yield Batch(batch.file, batch.start, rows)
        left += [
            {"problem": "question_without_annotation", "question": question, "question_id": key}
            for key, (question, _, _) in asked.items()
            if key not in answered
        ]
        for start in range(0, len(left), ROWS):
            yield Batch("(questions without an answer)", start, left[start : start + ROWS])

    def picture(self, image_id: Any, split: str, finder: ImageFinder) -> str | None:
        """The name of a picture; None where the id is none."""
        number = _number(image_id)
        return None if number is None else f"COCO_{split}_{number:012d}.jpg"

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one joined question; see `Source.draft`."""
        split = split_named(record.get("split"))
        held_out = "answer" in record and split not in self.options.splits
        if held_out and record.get("problem") != "record_not_an_object":
            return "held_out_split"
        if "problem" in record:
            return str(record["problem"])
        answer = record["answer"]
        about = record["asked_about"]
        if about is not None and _number(about) != _number(answer.get("image_id")):
            return "image_id_differs"
        texts = human_answers(answer.get("answers"))
        given = text_of(answer.get("multiple_choice_answer"))
        if given is None or not given.strip():
            given = majority(texts) if texts else None
            given = self.mend(given, answer, notes) if given else None
        meta = self.facts(answer)
        if split != "train":
            meta["split"] = split
        identity = text_of(answer.get("question_id"))
        return self.short(
            record["question"], given, record["image"], notes, orig_id=identity, meta=meta
        )

    def mend(self, given: str, answer: dict[str, Any], notes: Counter[str]) -> str:
        """The majority's answer, mended where the set is known to spoil it."""
        return given

    def facts(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Further facts of an answer for the record's `meta`."""
        return {}

    def _split(self, path: Path) -> str:
        """The split that a file tells, such as `val2014`; empty where it tells none."""
        given = _SPLIT.findall(path.name)
        told = read_head(path, "data_subtype", whole=not given)
        given += [told] if isinstance(told, str) and split_named(told) else []
        return _stricter(*given)


def _stricter(*splits: str) -> str:
    """The one that is held out, if any is."""
    return max(filter(None, splits), key=lambda word: split_named(word) != "train", default="")


def _question_id(record: Any) -> str | None:
    value = record.get("question_id") if isinstance(record, dict) else None
    return (text_of(value) or None) if type(value) in (int, str) else None


def _number(value: Any) -> int | None:
    if type(value) is str and value.isascii() and value.isdigit() and len(value) < 19:
        return int(value)
    return value if type(value) is int and 0 <= value < 1 << 63 else None
