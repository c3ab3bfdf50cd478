"""GQA: compositional questions about Visual Genome pictures, one JSON object keyed by question.

Entry: `{"question", "imageId", "answer", "fullAnswer", …}`. The short answer is trained on, or with
`full_answers` the sentence (style chat then reads better). The split is in the file's name, and
only train files enter unless `splits` says otherwise (testdev counts as test).

Usage:
    python -m data_builders.sources.gqa --annotations train_balanced_questions.json \\
        --images gqa/images --out builds/gqa
"""

from collections import Counter
from typing import Any

from data_builders.clean import text_of
from data_builders.published import File, Folder
from data_builders.source import Draft, Source
from data_builders.splits import SplitOptions, split_of_file


class GqaOptions(SplitOptions):
    """Options.

    Attributes:
        full_answers: Whether whole sentences are the answers, true or false.
    """

    full_answers: bool = False


class Gqa(Source):
    """See the module."""

    name = "gqa"
    title = "GQA, balanced questions"
    license = "CC-BY-4.0"
    home = "downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip and images.zip"
    # Sizes: cs.stanford.edu/people/dorarad/gqa/download.html (questions), and for images.zip the
    # file list of huggingface.co/leonardPKU/llava1.5_data.
    files = (
        File("questions1.2.zip", 1_400_000_000, "holds the files below"),
        File("train_balanced_questions.json", 0, "943k questions"),
        File("val_balanced_questions.json", 0, "held out"),
        File("testdev_balanced_questions.json", 0, "12,578; held out"),
    )
    image_folders = (Folder("gqa/images", "images.zip, ~21.8 GB; or Visual Genome's folders"),)
    keyed = True
    style = "vqa"
    Options = GqaOptions

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one question; see `Source.draft`."""
        entry = record["entry"]
        if type(entry) is not dict:
            return "record_not_an_object"
        split = split_of_file(self.file) or "train"
        if split not in self.options.splits:
            return "held_out_split"
        image = text_of(entry.get("imageId"))
        return self.short(
            entry.get("question"),
            entry.get("fullAnswer" if self.options.full_answers else "answer"),
            f"{image}.jpg" if image else image,
            notes,
            orig_id=record["id"],
            meta={} if split == "train" else {"split": split},
        )


SOURCE = Gqa

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("gqa")
