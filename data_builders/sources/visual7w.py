"""Visual7W: questions about COCO pictures, answered in words (telling) or by a box (pointing).

Both files hold `images`, each with its split and its `qa_pairs`; every pair is a record. A telling
answer is a short text, and its wrong choices are not used. A pointing answer is the number of a
box of the same file (x, y, width, height in pixels) and is written as `[[x0,y0,x1,y1]]`; the file
does not give the pictures' sides, so they are read from the pictures. Only `train` enters unless
`splits` says otherwise; published pointing scores choose among the four boxes of each question.

Usage:
    python -m data_builders.sources.visual7w --annotations dataset_v7w_telling.json \\
        dataset_v7w_pointing.json --images visual7w/images --out builds/visual7w
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_builders.annotations import Batch, read_records
from data_builders.boxes import box_text, corners, look_up_size
from data_builders.clean import text_of
from data_builders.images import ImageFinder
from data_builders.prompts import pointing
from data_builders.published import File, Folder
from data_builders.source import Draft, Source
from data_builders.splits import SplitOptions, split_named


class Visual7w(Source):
    """See the module."""

    name = "visual7w"
    title = "Visual7W, telling and pointing"
    license = "not stated; COCO CC-BY-4.0"
    home = (
        "ai.stanford.edu/~yukez/papers/resources/dataset_v7w_telling.zip and "
        "dataset_v7w_pointing.zip; "
        "vision.stanford.edu/yukezhu/visual7w_images.zip"
    )
    # Size of the pictures: a README that fetches them ("1.7 GB images").
    files = (
        File("dataset_v7w_telling.json", 0, "139,868 questions; 69,817 of train"),
        File("dataset_v7w_pointing.json", 0, "188,068 questions; 93,813 of train"),
    )
    image_folders = (
        Folder("visual7w/images", "visual7w_images.zip, ~1.7 GB, 47,300 pictures called v7w_*.jpg"),
    )
    style = "vqa"
    Options = SplitOptions

    def batches(self, finder: ImageFinder) -> Iterator[Batch]:
        """Pairs, one record each, with their box where the answer is one."""
        for path in self.inputs():
            start = 0
            boxes: dict[int, Any] | None = None
            for batch in read_records(path, ("images",)):
                rows = [row for record in batch.records for row in _pairs(record)]
                if boxes is None and any(type(row.get("answer")) is int for row in rows):
                    boxes = _boxes(path)
                # a telling file has no boxes; a number in it is a number
                pointing = [row for row in rows if boxes and type(row.get("answer")) is int]
                looked_up: dict[Any, Any] = {}
                for row in pointing:
                    if row["split"] not in self.options.splits:
                        continue
                    row["box"] = boxes.get(row["answer"]) if boxes else None
                    name = str(row["image"])
                    if name not in looked_up:
                        looked_up[name] = look_up_size(finder, row["image"])
                    row["sides"], row["sides_missing"] = looked_up[name]
                yield Batch(batch.file, start, rows)
                start += len(rows)

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one pair; see `Source.draft`."""
        split = record["split"]
        if split not in self.options.splits:
            return "split_missing" if split is None else "held_out_split"
        if "problem" in record:
            return str(record["problem"])
        question, answer = record["question"], record["answer"]
        facts: dict[str, Any] = {"orig_id": text_of(record["id"])}
        facts["meta"] = {} if split == "train" else {"split": split}
        if "box" in record and type(question) is str and question.strip():
            box = corners(record["box"], sized=True) if record["box"] else "box_missing"
            if isinstance(box, str):
                return box
            if record["sides"] is None:
                return str(record["sides_missing"])
            answer = box_text([box], *record["sides"])
            if not answer.startswith("[["):
                return answer
            question = pointing(question)
            facts["style"] = self.entry.style or "base"
        return self.short(question, answer, record["image"], notes, **facts)


def _pairs(record: Any) -> list[dict[str, Any]]:
    """The questions of one picture; a picture without any is one record."""
    if type(record) is not dict:
        return [{"split": "train", "problem": "record_not_an_object", "record": record}]
    split, image = split_named(record.get("split")), record.get("filename")
    pairs = record.get("qa_pairs")
    if type(pairs) is not list or not pairs:
        return [{"split": split, "problem": "turns_missing", "record": record}]
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        if type(pair) is dict:
            rows.append(
                {
                    "split": split, "image": image, "id": pair.get("qa_id"),
                    "question": pair.get("question"), "answer": pair.get("answer"),
                }
            )  # fmt: skip
        else:
            rows.append({"split": split, "problem": "record_not_an_object", "record": pair})
    return rows


def _boxes(path: Path) -> dict[int, Any]:
    """Boxes by number, as (x, y, width, height); none where the file has no boxes."""
    table: dict[int, Any] = {}
    for batch in read_records(path, ("boxes",), needed=False):
        for record in batch.records:
            if type(record) is dict and type(record.get("box_id")) is int:
                table[record["box_id"]] = [record.get(k) for k in ("x", "y", "width", "height")]
    return table


SOURCE = Visual7w

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("visual7w")
