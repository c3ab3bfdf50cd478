"""TextVQA: questions about text in OpenImages pictures, ten answers each.

File: `{"data": [{"question_id", "question", "image_id", "answers": [10 strings], "set_name"}]}`.
The majority answers, the first on ties. Pictures of the validation split lie in `train_images`
too, so the split is read from `set_name`, and only `train` enters unless `splits` says otherwise.

Usage:
    python -m data_builders.sources.textvqa --annotations TextVQA_0.5.1_train.json \\
        --images textvqa/train_images --out builds/textvqa
"""

from collections import Counter
from typing import Any, Literal

from pydantic import Field

from data_builders.clean import majority, rounds, text_of
from data_builders.recipe import Strict
from data_builders.source import Draft, File, Source
from data_builders.sources.vqav2 import human_answers


class SplitOptions(Strict):
    """Options: which splits may enter the build."""

    splits: list[Literal["train", "val"]] = Field(default=["train"], min_length=1)


class Textvqa(Source):
    """See the module."""

    name = "textvqa"
    title = "TextVQA 0.5.1"
    license = "CC-BY-4.0"
    home = "textvqa.org/dataset"
    files = (
        File("TextVQA_0.5.1_train.json", 0, "34,602 questions"),
        File("TextVQA_0.5.1_val.json", 0, "5,000; held out"),
        File("train_val_images.zip", 0, "pictures of both"),
    )
    image_folders = ("train_images",)
    wrappers = ("data",)
    style = "vqa"
    Options = SplitOptions

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one record; see `Source.draft`."""
        if type(record) is not dict:
            return "record_not_an_object"
        if record.get("set_name", "train") not in self.options.splits:
            return "held_out_split"
        question, image = record.get("question"), record.get("image_id")
        if type(question) is not str:
            return "empty_question" if question is None else "question_not_a_text"
        if type(image) is not str or not image:
            return "image_name_missing"
        answers = human_answers(record.get("answers"))
        if not answers:
            return "empty_answer"
        turns = rounds([question, majority(answers)], notes)
        if type(turns) is str:
            return turns
        assert isinstance(turns, list)
        identity = text_of(record.get("question_id"))
        return Draft(turns, [f"{image}.jpg"], self.default_style, identity)


SOURCE = Textvqa

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("textvqa")
