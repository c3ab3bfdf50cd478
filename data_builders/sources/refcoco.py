"""RefCOCO, RefCOCO+ and RefCOCOg: expressions that name one thing in a COCO train2014 picture.

`--annotations` takes REFER's pickles, `refs(unc).p` for RefCOCO and RefCOCO+ and `refs(umd).p` for
RefCOCOg (its `google` split shares pictures between train and val and is refused), with the
`instances.json` that lies beside them or that `--instances` names; a JSON list of the same refs; or
Shikra's JSON Lines (`img_path`, `expression`, `bbox` as corners). Pickles are read without running
any code. Every sentence is a record. Boxes (x, y, width, height in `instances.json`) become
`[[x0,y0,x1,y1]]` in thousandths. `task: rec` asks where the expression is, `task: reg` asks for an
expression of the box. val, testA, testB and test stay out unless `splits` names them; all of their
pictures are COCO train2014, hence in LLaVA-Instruct too.

Usage:
    python -m data_builders.sources.refcoco --annotations "refcoco/refs(unc).p" \\
        --instances refcoco/instances.json --images coco/train2014 --out builds/refcoco
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from cogvlm_sft.errors import DataError
from data_builders.annotations import ROWS, Batch, read_records
from data_builders.boxes import box_text, corners, look_up_size, picture_size
from data_builders.clean import choose, clean_question, text_of
from data_builders.images import ImageFinder
from data_builders.pickles import read_pickle
from data_builders.prompts import WHERE_IS
from data_builders.published import COCO_TRAIN2014, File
from data_builders.recipe import Strict
from data_builders.source import Draft, Source
from data_builders.splits import split_of_file

WHERE = (
    WHERE_IS,
    "Find {} in the image and give its box in [[x0,y0,x1,y1]] format.",
    "Give the coordinates of {} in [[x0,y0,x1,y1]] format.",
)
WHAT = (
    "What is at {}? Name it so that nothing else in the image is meant.",
    "Give an expression for the region {} that fits nothing else in the image.",
    "Describe the object at {} briefly and unmistakably.",
)


class RefcocoOptions(Strict):
    """Options.

    Attributes:
        instances: `instances.json` of the same set, for REFER's refs.
        splits: Which splits may enter; held-out ones only for evaluation.
        task: `rec`, from an expression to its box, or `reg`, the other way.
    """

    instances: list[Path] = Field(default_factory=list)
    splits: list[Literal["train", "val", "test", "testA", "testB"]] = Field(
        default=["train"], min_length=1
    )
    task: Literal["rec", "reg"] = "rec"

    @field_validator("instances", "splits", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value


class Refcoco(Source):
    """See the module."""

    name = "refcoco"
    title = "RefCOCO, RefCOCO+, RefCOCOg"
    license = "Apache-2.0 (REFER); COCO CC-BY-4.0"
    home = (
        "bvisionweb1.cs.unc.edu/licheng/referit/data/refcoco.zip, refcoco+.zip, refcocog.zip, or "
        "web.archive.org's copies of 2022; images.cocodataset.org/zips; or Shikra's annotations"
    )
    files = (
        File("refcoco/refs(unc).p", 0, "142,209 expressions"),
        File("refcoco/instances.json", 0, "its boxes"),
        File("refcoco+/refs(unc).p", 0, "141,564 expressions"),
        File("refcoco+/instances.json", 0, "its boxes"),
        File("refcocog/refs(umd).p", 0, "95,010 expressions"),
        File("refcocog/instances.json", 0, "its boxes"),
    )
    image_folders = (COCO_TRAIN2014,)
    style = "base"
    Options = RefcocoOptions

    def inputs(self) -> list[Path]:
        """Refs and instances."""
        return sorted({*self._refs(), *self._instance_files()}, key=lambda p: (p.name, str(p)))

    def _refs(self) -> list[Path]:
        refs = [path for path in super().inputs() if not path.name.startswith("instances")]
        for path in refs:
            if "google" in path.name:
                raise DataError(
                    f"{path}: Google's split of RefCOCOg shares pictures between train and val; "
                    "use refs(umd).p"
                )
        return refs

    def _instance_files(self) -> list[Path]:
        """What `instances` names, else what is listed or lies beside the refs."""
        if self.options.instances:
            return sorted(set(self.options.instances))
        listed = {path for path in super().inputs() if path.name.startswith("instances")}
        beside = {path.parent / "instances.json" for path in super().inputs()}
        return sorted(listed or {path for path in beside if path.is_file()})

    def batches(self, finder: ImageFinder) -> Iterator[Batch]:
        """Sentences, one record each, with their box in pixels and their picture's sides."""
        pictures: dict[str, Any] | None = None
        boxes: dict[str, Any] = {}
        for path in self._refs():
            start = 0
            for records in _records(path):
                rows: list[dict[str, Any]] = []
                for record in records:
                    if type(record) is not dict:
                        rows.append({"problem": "record_not_an_object", "record": record})
                    elif "expression" in record or "img_path" in record:
                        rows.append(_shikra(record, path, finder))
                    else:
                        if pictures is None:
                            pictures, boxes = self._instances()
                        rows += _refer(record, pictures, boxes, finder)
                yield Batch(path.name, start, rows)
                start += len(rows)

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one sentence; see `Source.draft`."""
        split = record.get("split", "train")
        if split not in self.options.splits:
            return "held_out_split" if type(split) is str else "split_missing"
        if "problem" in record:
            return str(record["problem"])
        expression = record["expression"]
        if type(expression) is not str or not expression.strip():
            missing = expression is None or type(expression) is str
            return "empty_question" if missing else "question_not_a_text"
        expression = clean_question(expression)
        box = corners(record["box"], record["sized"])
        if isinstance(box, str):
            return box
        if record["sides"] is None:
            return str(record["sides_missing"])
        place = box_text([box], *record["sides"])
        if not place.startswith("[["):
            return place
        phrase = expression.rstrip(" .?")
        rec = self.options.task == "rec"
        request = choose(WHERE if rec else WHAT, expression).format(phrase if rec else place)
        identity = text_of(record["id"])
        meta = {"split": split} if split != "train" else {}
        answer = place if rec else expression
        return self.short(request, answer, record["image"], notes, orig_id=identity, meta=meta)

    def _instances(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Pictures and boxes of `instances.json`, by id."""
        files = self._instance_files()
        if not files:
            raise DataError(
                f"source {self.entry.name}: no instances given; refs name boxes by number. Set "
                "`instances` to the instances.json that came with them"
            )
        pictures: dict[str, Any] = {}
        boxes: dict[str, Any] = {}
        for path in files:
            for key, table in (("images", pictures), ("annotations", boxes)):
                for batch in read_records(path, (key,)):
                    for record in batch.records:
                        identity = text_of(record.get("id")) if type(record) is dict else None
                        if identity is not None:
                            table[identity] = (
                                record.get("bbox")
                                if table is boxes
                                else (
                                    record.get("file_name"),
                                    picture_size(record.get("width"), record.get("height")),
                                )
                            )
        return pictures, boxes


def _records(path: Path) -> Iterator[list[Any]]:
    if path.suffix.lower() not in (".p", ".pkl", ".pickle"):
        yield from (batch.records for batch in read_records(path, ("refs", "annotations")))
        return
    refs = read_pickle(path)
    if type(refs) is not list:
        raise DataError(f"{path}: expected a list of refs, found a {type(refs).__name__}")
    yield from (refs[start : start + ROWS] for start in range(0, len(refs), ROWS))


def _refer(
    ref: dict[str, Any], pictures: dict[str, Any], boxes: dict[str, Any], finder: ImageFinder
) -> list[dict[str, Any]]:
    """One record for each sentence of a ref."""
    split = ref.get("split")
    picture, box = text_of(ref.get("image_id")), text_of(ref.get("ann_id"))
    row: dict[str, Any] = {"split": split, "id": ref.get("ref_id"), "sized": True}
    sentences = ref.get("sentences")
    if type(sentences) is not list or not sentences:
        return [row | {"problem": "turns_missing"}]
    if box is None or box not in boxes:
        row["problem"] = "box_missing"
    elif picture is None or picture not in pictures:
        row["problem"] = "picture_not_in_instances"
    else:
        # a ref's own file_name ends in the number of its box; the picture's is in instances.json
        name, sides = pictures[picture]
        row |= {"image": name, "box": boxes[box], "sides": sides}
        if sides is None and split is not None:
            row["sides"], row["sides_missing"] = look_up_size(finder, name)
    rows = []
    for sentence in sentences:
        if type(sentence) is not dict:
            rows.append(row | {"problem": "record_not_an_object"})
            continue
        said = sentence.get("sent")
        said = said if said not in (None, "") else sentence.get("raw")
        rows.append(row | {"expression": said, "id": sentence.get("sent_id", ref.get("ref_id"))})
    return rows


def _shikra(record: dict[str, Any], path: Path, finder: ImageFinder) -> dict[str, Any]:
    image, reason = record.get("img_path"), ""
    sides = picture_size(record.get("width"), record.get("height"))
    if sides is None:
        sides, reason = look_up_size(finder, image)
    return {
        "split": split_of_file(path.name) or "train",
        "image": image, "expression": record.get("expression"), "box": record.get("bbox"),
        "sized": False, "sides": sides, "sides_missing": reason, "id": record.get("id"),
    }  # fmt: skip


SOURCE = Refcoco

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("refcoco")
