"""TextCaps: captions that read the text in OpenImages pictures, five a picture.

File: `{"data": [{"image_id", "caption_str", "caption_id", "set_name"}]}`, one caption a row. Its
pictures are TextVQA's, and those of validation lie in the same folder, so the split is read from
`set_name`, else from the file's name.

Usage:
    python -m data_builders.sources.textcaps --annotations TextCaps_0.1_train.json \\
        --images textvqa/train_images --out builds/textcaps
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_builders.annotations import read_records
from data_builders.caption_sets import CaptionSource
from data_builders.clean import text_of
from data_builders.published import File, Folder
from data_builders.splits import split_named


class Textcaps(CaptionSource):
    """See the module."""

    name = "textcaps"
    title = "TextCaps 0.1"
    license = "CC-BY-4.0"
    home = "dl.fbaipublicfiles.com/textvqa/data/textcaps and /images; textvqa.org/textcaps/dataset"
    # Size of the pictures: file list of huggingface.co/datasets/redactable-llm/TextVQA.
    files = (
        File("TextCaps_0.1_train.json", 0, "21,953 pictures, 109,765 captions"),
        File("TextCaps_0.1_val.json", 0, "held out"),
        File("train_val_images.zip", 7_070_000_000, "TextVQA's pictures"),
    )
    image_folders = (
        Folder("textvqa/train_images", "train_val_images.zip, pictures of train and val"),
    )

    def _rows(self, path: Path) -> Iterator[list[Any]]:
        for batch in read_records(path, ("data",)):
            yield [self._row(record, path) for record in batch.records]

    def _row(self, record: Any, path: Path) -> dict[str, Any]:
        if not isinstance(record, dict):
            return {"split": "train", "problem": "record_not_an_object", "record": record}
        told = record.get("set_name")
        image = text_of(record.get("image_id"))
        return {
            "split": split_named(told) if told else self.split(path) or "train",
            "caption": record.get("caption_str"),
            "image": f"{image}.jpg" if image else image,
            "id": record.get("caption_id"),
        }


SOURCE = Textcaps

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("textcaps")
