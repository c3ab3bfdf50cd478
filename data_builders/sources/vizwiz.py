"""VizWiz-VQA: pictures and spoken questions by blind people, ten answers each.

File: a list of `{"image", "question", "answers": [{"answer", "answer_confidence"}], "answerable"}`.
The majority answers, the first on ties. "unanswerable" is an answer like any other, since saying so
is what it teaches; `max_unanswerable` caps its share of what the build holds in the end, choosing
by hash which ones stay. The split is in the picture's name, and only `train` enters unless `splits`
says otherwise.

Usage:
    python -m data_builders.sources.vizwiz --annotations Annotations/train.json --images train \\
        --out builds/vizwiz
"""

import re
from collections import Counter
from typing import Any

from pydantic import Field

from data_builders.clean import human_answers, majority
from data_builders.published import File, Folder
from data_builders.recipe import SourceEntry
from data_builders.source import Draft, Source
from data_builders.splits import SplitOptions, split_named, split_of_file

_SPLIT = re.compile(r"VizWiz_([A-Za-z]+)_")


class VizwizOptions(SplitOptions):
    """Options.

    Attributes:
        max_unanswerable: The largest share of conversations that may answer "unanswerable", 0 to 1.
    """

    max_unanswerable: float = Field(default=1.0, ge=0, le=1)


class Vizwiz(Source):
    """See the module."""

    name = "vizwiz"
    title = "VizWiz-VQA"
    license = "CC-BY-4.0"
    home = (
        "vizwiz.cs.colorado.edu/VizWiz_final/vqa_data/Annotations.zip; "
        "vizwiz.cs.colorado.edu/VizWiz_final/images/train.zip"
    )
    # Size: file list of huggingface.co/datasets/studymakesmehappyyyyy/llava_eval, vizwiz.
    files = (
        File("Annotations.zip", 1_710_000, "holds the files below"),
        File("vizwiz/Annotations/train.json", 0, "20,523 questions"),
        File("vizwiz/Annotations/val.json", 0, "4,319; held out"),
    )
    image_folders = (Folder("vizwiz/train", "train.zip, size not published"),)
    style = "vqa"
    Options = VizwizOptions

    def __init__(self, entry: SourceEntry) -> None:
        super().__init__(entry)
        share = self.options.max_unanswerable
        self.limit = ("unanswerable", share) if share < 1 else None

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one record; see `Source.draft`."""
        if type(record) is not dict:
            return "record_not_an_object"
        image = record.get("image")
        named = _SPLIT.search(image) if type(image) is str else None
        split = split_named(named.group(1)) if named else None
        if (split or split_of_file(self.file) or "train") not in self.options.splits:
            return "held_out_split"
        answers = human_answers(record.get("answers"))
        return self.short(
            record.get("question"),
            majority(answers) if answers else None,
            image,
            notes,
            orig_id=image,
            meta={} if split in ("train", None) else {"split": split},
        )


SOURCE = Vizwiz

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("vizwiz")
