"""VQAv2: questions about COCO pictures, ten human answers each, question and answer files apart.

`--questions` takes the question files, `--annotations` the answer files; they are joined by
`question_id`. The training answer is `multiple_choice_answer`, the majority of the ten. Pictures
are `COCO_train2014_%012d.jpg`, and are found under train2017 names too. A file of the validation
split is refused record by record, unless `splits` names it: evaluations use it.

Usage:
    python -m data_builders.sources.vqav2 \\
        --questions v2_OpenEnded_mscoco_train2014_questions.json \\
        --annotations v2_mscoco_train2014_annotations.json --images coco --out builds/vqav2
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from cogvlm_sft.errors import DataError
from data_builders.annotations import Batch, read_records
from data_builders.clean import majority, rounds, text_of
from data_builders.images import ImageFinder
from data_builders.recipe import Strict
from data_builders.source import Draft, File, Source

_SPLIT = re.compile(r"(train|val|test)\d{4}")


class JoinedOptions(Strict):
    """Options of question sets in two files.

    Attributes:
        questions: The question files.
        splits: Which splits may enter the build.
    """

    questions: list[Path] = Field(default_factory=list)
    splits: list[Literal["train", "val"]] = Field(default=["train"], min_length=1)

    @field_validator("questions", "splits", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value


class JoinedVqa(Source):
    """A question set in VQA's two-file form."""

    wrappers = ("annotations",)
    style = "vqa"
    Options = JoinedOptions

    def inputs(self) -> list[Path]:
        """Answer files and question files."""
        if not self.options.questions:
            raise DataError(
                f"source {self.entry.name}: no questions given; answers alone hold no question "
                f"text. Set `questions` to {self.files[0].name}"
            )
        return sorted({*super().inputs(), *self.options.questions}, key=lambda p: (p.name, str(p)))

    def batches(self, finder: ImageFinder) -> Iterator[Batch]:
        """Answers, each with its question; then the questions that nobody answered."""
        waiting: dict[Any, Any] = {}
        for path in sorted(set(self.options.questions)):
            for batch in read_records(path, ("questions",)):
                for index, record in enumerate(batch.records, start=batch.start):
                    known = type(record) is dict and type(record.get("question_id")) in (int, str)
                    key = record["question_id"] if known else ("odd", path.name, index)
                    waiting[key] = record.get("question") if known else record
        asked = dict(waiting)
        for path in super().inputs():
            split = _SPLIT.search(path.name)
            for batch in read_records(path, self.wrappers):
                joined = []
                for answer in batch.records:
                    key = answer.get("question_id") if type(answer) is dict else None
                    key = key if type(key) in (int, str) else None
                    waiting.pop(key, None)
                    joined.append(
                        {
                            "question": asked.get(key),
                            "answer": answer,
                            "split": split.group() if split else "train2014",
                        }
                    )
                yield Batch(batch.file, batch.start, joined)
        if waiting:
            left = [{"question": question, "unanswered": True} for question in waiting.values()]
            yield Batch("(questions without an answer)", 0, left)

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one joined question; see `Source.draft`."""
        if record.get("unanswered"):
            return "question_without_annotation"
        answer = record["answer"]
        if type(answer) is not dict:
            return "record_not_an_object"
        if record["split"][:-4] not in self.options.splits:
            return "held_out_split"
        if type(record["question"]) is not str:
            return "annotation_without_question"
        number = answer.get("image_id")
        if type(number) is str and number.isdigit():
            number = int(number)
        if type(number) is not int:
            return "image_name_missing"
        given = text_of(answer.get("multiple_choice_answer"))
        if not given:
            texts = human_answers(answer.get("answers"))
            if not texts:
                return "empty_answer"
            given = majority(texts)
        turns = rounds([record["question"], given], notes)
        if type(turns) is str:
            return turns
        assert isinstance(turns, list)
        identity = text_of(answer.get("question_id"))
        image = f"COCO_{record['split']}_{number:012d}.jpg"
        return Draft(turns, [image], self.default_style, identity)


def human_answers(answers: Any) -> list[str]:
    """The texts of a list of answers: strings, or objects with `answer`."""
    if type(answers) is not list:
        return []
    texts = [text_of(a.get("answer") if type(a) is dict else a) for a in answers]
    return [text for text in texts if text and text.strip()]


class Vqav2(JoinedVqa):
    """See the module."""

    name = "vqav2"
    title = "VQAv2, real images"
    license = "CC-BY-4.0"
    home = "visualqa.org/download.html; COCO: cocodataset.org"
    files = (
        File("v2_OpenEnded_mscoco_train2014_questions.json", 0, "443,757 questions"),
        File("v2_mscoco_train2014_annotations.json", 0, "ten answers a question"),
        File("v2_OpenEnded_mscoco_val2014_questions.json", 0, "214,354; held out"),
        File("v2_mscoco_val2014_annotations.json", 0, "held out"),
    )
    image_folders = ("train2014, val2014, or train2017",)


SOURCE = Vqav2

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("vqav2")
