"""GQA: compositional questions about Visual Genome pictures, one JSON object keyed by question.

Entry: `{"question", "imageId", "answer", "fullAnswer", …}`. The short answer is trained on, or with
`full_answers` the sentence (style chat then reads better). The split is in the file's name, and
only train files enter unless `splits` says otherwise; testdev never does.

Usage:
    python -m data_builders.sources.gqa --annotations train_balanced_questions.json \\
        --images gqa/images --out builds/gqa
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from data_builders.annotations import ROWS, Batch, read_mapping
from data_builders.clean import rounds, text_of
from data_builders.images import ImageFinder
from data_builders.source import Draft, File, Source
from data_builders.sources.textvqa import SplitOptions

_SPLIT = re.compile(r"(train|val|testdev|test|challenge|submission)")


class GqaOptions(SplitOptions):
    """Options: splits, and whether whole sentences are the answers."""

    full_answers: bool = False


class Gqa(Source):
    """See the module."""

    name = "gqa"
    title = "GQA, balanced questions"
    license = "CC-BY-4.0"
    home = "cs.stanford.edu/people/dorarad/gqa/download.html"
    files = (
        File("train_balanced_questions.json", 0, "943k questions"),
        File("val_balanced_questions.json", 0, "held out"),
        File("testdev_balanced_questions.json", 0, "12,578; never in a build"),
    )
    image_folders = ("images, or VG_100K and VG_100K_2",)
    style = "vqa"
    Options = GqaOptions

    def batches(self, finder: ImageFinder) -> Iterator[Batch]:
        """Questions with their number and the split of their file."""
        for path in self.inputs():
            found = _SPLIT.search(path.name)
            split = found.group(1) if found else "train"
            pairs = read_mapping(path)
            start = 0
            while part := [
                {"id": key, "split": split, "entry": entry} for key, entry in islice(pairs, ROWS)
            ]:
                yield Batch(path.name, start, part)
                start += len(part)

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one question; see `Source.draft`."""
        entry = record["entry"]
        if type(entry) is not dict:
            return "record_not_an_object"
        if record["split"] not in self.options.splits:
            return "held_out_split"
        image = text_of(entry.get("imageId"))
        if not image:
            return "image_name_missing"
        question = text_of(entry.get("question"))
        answer = text_of(entry.get("fullAnswer" if self.options.full_answers else "answer"))
        if question is None or answer is None:
            return "empty_question" if question is None else "empty_answer"
        turns = rounds([question, answer], notes)
        if type(turns) is str:
            return turns
        assert isinstance(turns, list)
        return Draft(turns, [f"{image}.jpg"], self.default_style, record["id"])


SOURCE = Gqa

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("gqa")
