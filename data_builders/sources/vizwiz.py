"""VizWiz-VQA: pictures and spoken questions by blind people, ten answers each.

File: a list of `{"image", "question", "answers": [{"answer", "answer_confidence"}], "answerable"}`.
The majority answers; "unanswerable" is kept as an answer, since saying so is what it teaches. The
split is in the picture's name, and only `train` enters unless `splits` says otherwise.

Usage:
    python -m data_builders.sources.vizwiz --annotations Annotations/train.json --images train \\
        --out builds/vizwiz
"""

import re
from collections import Counter
from typing import Any

from data_builders.clean import majority, rounds
from data_builders.source import Draft, File, Source
from data_builders.sources.textvqa import SplitOptions
from data_builders.sources.vqav2 import human_answers

_SPLIT = re.compile(r"VizWiz_(train|val|test)_")


class Vizwiz(Source):
    """See the module."""

    name = "vizwiz"
    title = "VizWiz-VQA"
    license = "CC-BY-4.0"
    home = "vizwiz.org/tasks-and-datasets/vqa"
    files = (
        File("train.json", 0, "20,523 questions, in Annotations.zip"),
        File("val.json", 0, "4,319; held out"),
        File("train.zip", 0, "pictures"),
    )
    image_folders = ("train",)
    style = "vqa"
    Options = SplitOptions

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one record; see `Source.draft`."""
        if type(record) is not dict:
            return "record_not_an_object"
        image, question = record.get("image"), record.get("question")
        if type(image) is not str or not image:
            return "image_name_missing"
        split = _SPLIT.search(image)
        if split and split.group(1) not in self.options.splits:
            return "held_out_split"
        if type(question) is not str:
            return "empty_question" if question is None else "question_not_a_text"
        answers = human_answers(record.get("answers"))
        if not answers:
            return "empty_answer"
        turns = rounds([question, majority(answers)], notes)
        if type(turns) is str:
            return turns
        assert isinstance(turns, list)
        return Draft(turns, [image], self.default_style, image)


SOURCE = Vizwiz

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("vizwiz")
