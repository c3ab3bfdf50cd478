"""Answers that are boxes: RefCOCO, RefCOCO+, RefCOCOg and Visual7W pointing.

A phrase is asked for with a sentence of the released grounding templates in the `base` template. A
hit is IoU strictly above one half between the true box and the smallest box around all boxes of
the answer, both in pixels of the picture (THUDM/CogVLM issue 127); an answer without a box is
wrong. The denominator is the number of sentences. `refs(*).p` are pickles and are read without
running any code.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.metrics.boxes import (
    Box,
    intersection_over_union,
    merge_boxes,
    parse_boxes,
    to_pixels,
    write_box,
)
from cogvlm_sft.evaluation.metrics.intervals import Figure, mean_of, mean_within
from cogvlm_sft.evaluation.tasks import published
from cogvlm_sft.evaluation.tasks.choices import visual7w_pairs
from cogvlm_sft.evaluation.tasks.task import (
    Pictures,
    Question,
    Scores,
    Task,
    field_of,
    load_json,
    one_file,
)
from data_builders.pickles import read_pickle
from data_builders.prompts import WHERE_IS, pointing

_IOU = 0.5


def _refcoco(paths: Sequence[Path], images: Path) -> list[Question]:
    """Every sentence of the parts that are not for training; the group is the part."""
    if len(paths) != 2:
        raise DataError(f"RefCOCO takes refs(*).p and instances.json, found {len(paths)} file(s)")
    instances_path = next((path for path in paths if "instances" in path.name), None)
    if instances_path is None:
        raise DataError(f"no instances.json among {', '.join(path.name for path in paths)}")
    refs_path = next(path for path in paths if path != instances_path)
    if "google" in refs_path.name:
        raise DataError(
            f"{refs_path}: the google split shares pictures between training and validation, and "
            "no published figure here is of it; expected refs(unc).p or, of RefCOCOg, refs(umd).p"
        )
    refs = load_json(refs_path) if refs_path.suffix == ".json" else read_pickle(refs_path)
    if not isinstance(refs, list):
        raise DataError(f"{refs_path}: expected a list of references; is this the official file?")
    instances = load_json(instances_path, dict)
    told, shown = (
        {
            field_of(row, "id", name, int): row
            for row in field_of(instances, name, "instances", list)
        }
        for name in ("annotations", "images")
    )
    pictures = Pictures(images)
    questions = []
    for ref in refs:
        part = field_of(ref, "split", str(refs_path), str)
        if part == "train":
            continue
        where = f"reference {field_of(ref, 'ref_id', str(refs_path), int)}"
        picture = shown.get(field_of(ref, "image_id", where, int))
        thing = told.get(field_of(ref, "ann_id", where, int))
        if picture is None or thing is None:
            raise DataError(f"{where}: its picture or box is not in {instances_path}")
        box = _corners(field_of(thing, "bbox", where, list), where)
        file = pictures.find(field_of(picture, "file_name", where, str), where=where)
        width, height = (field_of(picture, side, where, int) for side in ("width", "height"))
        for sentence in field_of(ref, "sentences", where, list):
            identity = field_of(sentence, "sent_id", where, int)
            # Bytes of Python 2 that are no UTF-8 can be neither asked nor written.
            said = field_of(sentence, "sent", where, str).encode("utf-8", "replace").decode()
            questions.append(
                Question(
                    id=str(identity),
                    images=(file,),
                    text=WHERE_IS.format(said),
                    style="base",
                    truth={"box": box, "width": width, "height": height},
                    shown=write_box(box, width, height),
                    group=part,
                    upload={"ref_id": ref["ref_id"], "sent_id": identity},
                )
            )
    if not questions:
        raise DataError(f"{paths[0]}: holds training references only")
    return questions


def _corners(bbox: list[Any], where: str) -> Box:
    """x0, y0, x1, y1 of COCO's x, y, width, height.

    Raises:
        DataError: It is not four numbers.
    """
    if len(bbox) != 4 or any(type(side) not in (int, float) for side in bbox):
        raise DataError(f"{where}: bbox is {bbox!r}, expected x, y, width and height")
    x, y, width, height = bbox
    return (x, y, x + width, y + height)


def predicted_box(question: Question, answer: str) -> Box | None:
    """The box of an answer in pixels of its picture; None where there is none."""
    merged = merge_boxes(parse_boxes(answer))
    truth = question.truth
    return None if merged is None else to_pixels(merged, truth["width"], truth["height"])


def _refcoco_score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    each = []
    for question, answer in zip(questions, answers, strict=True):
        box = predicted_box(question, answer)
        overlap = intersection_over_union(box, question.truth["box"]) if box else 0.0
        each.append(float(overlap > _IOU))
    parts = [question.group for question in questions]
    figures = [
        Figure(f"accuracy, {part}", mean_within(each, parts, part)) for part in sorted(set(parts))
    ]
    return Scores(figures, each)


def _pointing(paths: Sequence[Path], images: Path) -> list[Question]:
    content = load_json(one_file(paths, "visual7w_pointing"), dict)
    boxes = {}
    for row in field_of(content, "boxes", "Visual7W pointing", list):
        where = f"box {field_of(row, 'box_id', 'Visual7W pointing', int)}"
        sides = [field_of(row, side, where) for side in ("x", "y", "width", "height")]
        boxes[row["box_id"]] = _corners(sides, where)
    pictures = Pictures(images)
    sizes: dict[Path, tuple[float, float]] = {}
    questions = []
    for picture, pair in visual7w_pairs(content):
        identity = field_of(pair, "qa_id", "Visual7W pointing", int, str)
        where = f"question {identity}"
        name = field_of(picture, "filename", where, str)
        file = pictures.find(name, where=where)
        if file not in sizes:
            sizes[file] = pictures.size(name, where=where)
        width, height = sizes[file]
        right = field_of(pair, "answer", where, int)
        candidates = [right, *field_of(pair, "multiple_choices", where, list)]
        if strange := [one for one in candidates if type(one) is not int or one not in boxes]:
            raise DataError(f"{where}: {strange[0]!r} is the number of no box")
        questions.append(
            Question(
                id=str(identity),
                images=(file,),
                text=pointing(field_of(pair, "question", where, str)),
                style="base",
                truth={
                    "candidates": {str(one): boxes[one] for one in sorted(candidates)},
                    "right": str(right),
                    "width": width,
                    "height": height,
                },
                shown=write_box(boxes[right], width, height),
                upload={"qa_id": identity},
            )
        )
    return questions


def chosen_candidate(question: Question, answer: str) -> str | None:
    """The candidate box that an answer overlaps most; None without a box or any overlap."""
    box = predicted_box(question, answer)
    if box is None:
        return None
    overlaps = {
        name: intersection_over_union(box, candidate)
        for name, candidate in question.truth["candidates"].items()
    }
    best = max(overlaps, key=lambda name: overlaps[name])
    return best if overlaps[best] > 0 else None


def _pointing_score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    each = [
        float(chosen_candidate(question, answer) == question.truth["right"])
        for question, answer in zip(questions, answers, strict=True)
    ]
    return Scores([Figure("accuracy", mean_of(each))], each)


def _refcoco_rows(questions: Sequence[Question], answers: Sequence[str]) -> list[dict[str, Any]]:
    """No official format exists: the sentence, the answer, and its box as x, y, width, height."""
    rows = []
    for question, answer in zip(questions, answers, strict=True):
        box = predicted_box(question, answer)
        xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]] if box else None
        rows.append({**question.upload, "answer": answer, "bbox": xywh})
    return rows


def _pointing_rows(questions: Sequence[Question], answers: Sequence[str]) -> list[dict[str, Any]]:
    pairs = zip(questions, answers, strict=True)
    return [
        {**question.upload, "answer": answer, "box_id": chosen_candidate(question, answer)}
        for question, answer in pairs
    ]


def _task(name: str, title: str, refs: str, figures: tuple[published.Published, ...]) -> Task:
    return Task(
        name, title, f"{refs} and instances.json", _refcoco,
        "base template: " + WHERE_IS.format("{sentence}"),
        "all [[...]] boxes of the answer merged into one, thousandths turned into pixels",
        "share of sentences with IoU > 0.5, for every part of the file", _refcoco_score, 48,
        published=figures, upload_name=f"{name}_results.json", upload=_refcoco_rows,
    )  # fmt: skip


TASKS = (
    _task("refcoco", "RefCOCO", "refs(unc).p", published.REFCOCO),
    _task("refcoco+", "RefCOCO+", "refs(unc).p", published.REFCOCO_PLUS),
    _task("refcocog", "RefCOCOg", "refs(umd).p", published.REFCOCOG),
    Task(
        "visual7w_pointing", "Visual7W, pointing (test)", "dataset_v7w_pointing.json", _pointing,
        "base template: " + pointing("{question}"),
        "the answer's boxes merged; the candidate with the largest IoU is chosen",
        "share of questions whose candidate is the right one of four", _pointing_score, 48,
        published=published.VISUAL7W,
        upload_name="visual7w_pointing_results.json", upload=_pointing_rows,
    ),
)  # fmt: skip
