"""TextVQA: questions about text in OpenImages pictures, ten answers each.

File: `{"data": [{"question_id", "question", "image_id", "answers": [10 strings], "set_name"}]}`.
The majority answers, the first on ties. Pictures of the validation split lie in `train_images`
too, so the split is read from `set_name`, else from the file's name; only `train` enters unless
`splits` says otherwise.

Usage:
    python -m data_builders.sources.textvqa --annotations TextVQA_0.5.1_train.json \\
        --images textvqa/train_images --out builds/textvqa
"""

from collections import Counter
from typing import Any

from data_builders.clean import human_answers, majority, text_of
from data_builders.published import File, Folder
from data_builders.source import Draft, Source
from data_builders.splits import SplitOptions, split_named, split_of_file


class Textvqa(Source):
    """See the module."""

    name = "textvqa"
    title = "TextVQA 0.5.1"
    license = "CC-BY-4.0"
    home = "dl.fbaipublicfiles.com/textvqa/data and /images; textvqa.org/dataset"
    # Sizes: file list of huggingface.co/datasets/redactable-llm/TextVQA.
    files = (
        File("TextVQA_0.5.1_train.json", 21_600_000, "34,602 questions"),
        File("TextVQA_0.5.1_val.json", 3_120_000, "5,000; held out"),
        File("train_val_images.zip", 7_070_000_000, "pictures of both, unpacks to train_images"),
    )
    image_folders = (
        Folder("textvqa/train_images", "train_val_images.zip, pictures of train and val"),
    )
    style = "vqa"
    Options = SplitOptions

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one record; see `Source.draft`."""
        if type(record) is not dict:
            return "record_not_an_object"
        told = record.get("set_name")
        split = split_named(told) if told else split_of_file(self.file) or "train"
        if split not in self.options.splits:
            return "held_out_split"
        answers = human_answers(record.get("answers"))
        image = text_of(record.get("image_id"))
        return self.short(
            record.get("question"),
            majority(answers) if answers else None,
            f"{image}.jpg" if image else image,
            notes,
            orig_id=text_of(record.get("question_id")),
            meta={} if split == "train" else {"split": split},
        )


SOURCE = Textvqa

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("textvqa")
