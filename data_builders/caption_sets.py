"""Caption sets: every caption is a conversation of its own, asked for in one of three ways.

Two released shapes are read: COCO's (`images` and `annotations`, joined by the picture's id) and
Karpathy's (`images`, each with its split and its sentences), which is the split that results are
published on. The caption has no question in the data, so it becomes the answer to one of three
fixed requests, chosen by its hash; in style `base` nothing is asked, as in pretraining.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from data_builders.annotations import ROWS, Batch, read_records
from data_builders.clean import choose, text_of
from data_builders.images import ImageFinder
from data_builders.source import Draft, Source
from data_builders.splits import Split, SplitOptions, split_named, split_of_file

REQUESTS = (
    "Describe the image in one sentence.",
    "Provide a one-sentence caption for the image.",
    "What does the picture show? Answer in one sentence.",
)


class CaptionSource(Source):
    """A set of captions. A record here is one caption with its picture's name and split."""

    Options = SplitOptions

    def batches(self, finder: ImageFinder) -> Iterator[Batch]:
        """Captions, one record each; a picture without any is one record too."""
        for path in self.inputs():
            start = 0
            for rows in self._rows(path):
                yield Batch(path.name, start, rows)
                start += len(rows)

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one caption; see `Source.draft`."""
        split = record.get("split")
        if split not in self.options.splits:
            return "split_missing" if split is None else "held_out_split"
        if record.get("split_unknown"):
            notes["split_unknown"] += 1
        if "problem" in record:
            return str(record["problem"])
        caption = record["caption"]
        if type(caption) is not str:
            return "empty_answer" if caption is None else "answer_not_a_text"
        meta = dict(record.get("meta", ())) | ({} if split == "train" else {"split": split})
        request = choose(REQUESTS, caption)
        draft = self.short(
            request, caption, record["image"], notes, orig_id=text_of(record.get("id")), meta=meta
        )
        if isinstance(draft, Draft) and self.default_style == "base":
            draft.turns[0] = ""
        return draft

    def _rows(self, path: Path) -> Iterator[list[Any]]:
        pictures = read_records(path, ("images",))
        first = next(pictures, None)
        if first is None or not any(
            isinstance(record, dict) and "sentences" in record for record in first.records
        ):
            yield from self._joined(path)
            return
        for batch in chain([first], pictures):
            yield [row for record in batch.records for row in _sentences(record)]

    def _joined(self, path: Path) -> Iterator[list[Any]]:
        """COCO's shape: captions point at pictures."""
        told = self.split(path)
        split = told or "train"
        names: dict[str, dict[str, Any]] = {}
        rows: list[Any] = []
        for batch in read_records(path, ("images",)):
            for record in batch.records:
                key = text_of(record.get("id")) if isinstance(record, dict) else None
                if key is None or key in names:
                    problem = "picture_without_id" if key is None else "duplicate_picture_id"
                    rows.append({"split": split, "problem": problem, "record": record})
                else:
                    names[key] = record
        captioned: set[str] = set()
        for batch in read_records(path, ("annotations",)):
            for record in batch.records:
                if not isinstance(record, dict):
                    problem = "record_not_an_object"
                    rows.append({"split": split, "problem": problem, "record": record})
                    continue
                key = text_of(record.get("image_id"))
                name = names[key].get("file_name") if key in names else None
                row = {
                    "split": told or _split_of_picture(name),
                    "caption": record.get("caption"), "id": record.get("id"),
                }  # fmt: skip
                if key in names:
                    captioned.add(key)
                    row["image"] = name
                    row["meta"] = self.facts(names[key])
                else:
                    row["problem"] = "caption_without_picture"
                rows.append(row)
                if len(rows) >= ROWS:
                    yield rows
                    rows = []
        alone = [key for key in names if key not in captioned]
        yield rows + [
            {"split": split, "problem": "picture_without_caption", "record": names[key]}
            for key in alone
        ]

    def split(self, path: Path) -> Split | None:
        """The split of a file whose records do not tell it; None where its name tells none."""
        return split_of_file(path.name)

    def facts(self, picture: dict[str, Any]) -> dict[str, Any]:
        """Further facts of a picture for the record's `meta`."""
        return {}


def _split_of_picture(name: Any) -> Split:
    """What COCO's name of a picture tells, in a file whose own name tells nothing."""
    named = isinstance(name, str) and name.rsplit("/", 1)[-1].startswith("COCO_")
    return (split_of_file(name) if named else None) or "train"


def _sentences(record: Any) -> list[dict[str, Any]]:
    """The captions of one picture in Karpathy's shape."""
    if not isinstance(record, dict):
        return [{"split": "train", "problem": "record_not_an_object", "record": record}]
    split = split_named(record.get("split"))
    sentences, name = record.get("sentences"), record.get("filename")
    folder = record.get("filepath")
    if isinstance(name, str) and isinstance(folder, str) and folder:
        name = f"{folder}/{name}"
    if not isinstance(sentences, list) or not sentences:
        return [{"split": split, "problem": "picture_without_caption", "record": record}]
    rows: list[dict[str, Any]] = []
    for sentence in sentences:
        row: dict[str, Any] = {"split": split, "image": name}
        if isinstance(sentence, dict):
            row |= {"caption": sentence.get("raw"), "id": sentence.get("sentid")}
        else:
            row["problem"] = "record_not_an_object"
        rows.append(row)
    return rows
