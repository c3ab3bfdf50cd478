"""Every benchmark's official files in miniature: the shapes of the real ones, two to four rows."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy
from PIL import Image


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30)) -> Path:
    """A noisy picture, so that each one differs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3)
    pixels = numpy.random.default_rng(seed).integers(0, 256, shape, dtype=numpy.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl" or "pope" in path.name:
        text = "".join(json.dumps(row) + "\n" for row in content)
    else:
        text = json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def make(task: str, root: Path) -> tuple[list[Path], Path]:
    """The annotation files of a task, and its picture folder."""
    images = root / "images"
    picture(images / "val2014/COCO_val2014_000000000042.jpg", 1)
    picture(images / "val2014/COCO_val2014_000000000073.jpg", 2)
    picture(images / "a.jpg", 3)
    picture(images / "b.jpg", 4)
    files = _FILES[task](root)
    return files, images


def _vqa(root: Path, humans: int = 10) -> list[Path]:
    asked = [
        {"image_id": 42, "question": "What color is it?", "question_id": 1},
        {"image_id": 42, "question": "How many?", "question_id": 2},
        {"image_id": 73, "question": "Is it red?", "question_id": 3},
    ]
    kinds = ["color", "counting", "color"]
    answers = [["red"] * 7 + ["dark red"] * 3, ["2"] * 10, ["yes"] * 6 + ["no"] * 4]
    told = [
        {
            "question_id": row["question_id"],
            "image_id": row["image_id"],
            "question_type": kind,
            "answer_type": "other",
            "multiple_choice_answer": given[0],
            "answers": [{"answer": one, "answer_id": n} for n, one in enumerate(given[:humans])],
        }
        for row, given, kind in zip(asked, answers, kinds, strict=True)
    ]
    return [
        _write(root / "v2_OpenEnded_mscoco_val2014_questions.json",
               {"data_subtype": "val2014", "questions": asked}),
        _write(root / "v2_mscoco_val2014_annotations.json", {"annotations": told}),
    ]  # fmt: skip


def _captions(root: Path) -> list[Path]:
    content = {
        "images": [
            {"id": 1, "file_name": "a.jpg", "domain": "in-domain"},
            {"id": 2, "file_name": "b.jpg", "domain": "out-domain"},
        ],
        "annotations": [
            {"image_id": 1, "caption": "A cat sits on a mat."},
            {"image_id": 1, "caption": "The cat is on the mat."},
            {"image_id": 2, "caption": "Two dogs run in the park."},
        ],
    }
    return [_write(root / "nocaps_val_4500_captions.json", content)]


def _karpathy(root: Path) -> list[Path]:
    rows = [
        {"filename": name, "split": split, "sentences": [{"raw": "A cat."}, {"raw": "A dog."}]}
        for name, split in (("a.jpg", "test"), ("b.jpg", "train"))
    ]
    return [_write(root / "dataset_flickr30k.json", {"images": rows})]


def _textcaps(root: Path) -> list[Path]:
    rows = [
        {"image_id": "a", "caption_str": "A sign says STOP."},
        {"image_id": "a", "caption_str": "A stop sign."},
        {"image_id": "b", "caption_str": "A bus to LA."},
    ]
    return [_write(root / "TextCaps_0.1_val.json", {"data": rows})]


def _textvqa(root: Path) -> list[Path]:
    rows = [
        {"question_id": 5, "question": "What is written?", "image_id": "a",
         "answers": ["stop"] * 10},
        {"question_id": 6, "question": "What brand?", "image_id": "b", "answers": ["nokia"] * 10},
    ]  # fmt: skip
    return [_write(root / "TextVQA_0.5.1_val.json", {"data": rows})]


def _ocrvqa(root: Path) -> list[Path]:
    book = {"imageURL": "http://e.com/x.jpg", "questions": ["Who wrote it?", "What is its title?"],
            "answers": ["Ann Lee", "Trees"], "split": 3}  # fmt: skip
    return [_write(root / "dataset.json", {"a": book, "b": {**book, "split": 1}})]


def _gqa(root: Path) -> list[Path]:
    rows = {
        "201": {"question": "Which room is it?", "imageId": "a", "answer": "bedroom",
                "types": {"structural": "query"}},
        "202": {"question": "Is it red?", "imageId": "b", "answer": "no",
                "types": {"structural": "verify"}},
    }  # fmt: skip
    return [_write(root / "testdev_balanced_questions.json", rows)]


def _vizwiz(root: Path) -> list[Path]:
    rows = [
        {"image": "a.jpg", "question": "What is this?", "answer_type": "other",
         "answers": [{"answer": "basil"}] * 10},
        {"image": "b.jpg", "question": "What does it say?", "answer_type": "unanswerable",
         "answers": [{"answer": "unanswerable"}] * 10},
    ]  # fmt: skip
    return [_write(root / "val.json", rows)]


def _scienceqa(root: Path) -> list[Path]:
    picture(root / "images/test/7/image.png", 7)
    problem = {"question": "Which is larger?", "choices": ["cat", "whale"], "answer": 1,
               "hint": "Think of size.", "image": "image.png", "split": "test"}  # fmt: skip
    problems = {"7": problem, "8": {**problem, "image": None, "answer": 0}, "9": problem}
    return [
        _write(root / "problems.json", problems),
        _write(root / "pid_splits.json", {"train": ["9"], "test": ["7", "8"]}),
    ]


def _telling(root: Path) -> list[Path]:
    pair = {"qa_id": 11, "question": "What is on the mat?", "answer": "A cat.", "type": "what",
            "multiple_choices": ["A dog.", "A hat.", "A bat."]}  # fmt: skip
    rows = [{"filename": "a.jpg", "split": "test", "qa_pairs": [pair, {**pair, "qa_id": 12}]},
            {"filename": "b.jpg", "split": "train", "qa_pairs": [pair]}]  # fmt: skip
    return [_write(root / "dataset_v7w_telling.json", {"images": rows})]


def _pointing(root: Path) -> list[Path]:
    pair = {"qa_id": 21, "question": "Which thing is red?", "answer": 1, "type": "which",
            "multiple_choices": [2, 3, 4]}  # fmt: skip
    boxes = [
        {"box_id": 1, "x": 0, "y": 0, "width": 20, "height": 15},
        {"box_id": 2, "x": 20, "y": 0, "width": 20, "height": 15},
        {"box_id": 3, "x": 0, "y": 15, "width": 20, "height": 15},
        {"box_id": 4, "x": 20, "y": 15, "width": 20, "height": 15},
    ]
    rows = [{"filename": "a.jpg", "split": "test", "qa_pairs": [pair]}]
    return [_write(root / "dataset_v7w_pointing.json", {"images": rows, "boxes": boxes})]


def _refcoco(root: Path) -> list[Path]:
    refs = [
        {"ref_id": 1, "ann_id": 5, "image_id": 9, "split": "val", "file_name": "x_1.jpg",
         "sentences": [{"sent_id": 100, "sent": "red thing", "raw": "Red thing"},
                       {"sent_id": 101, "sent": "left one", "raw": "left one"}]},
        {"ref_id": 2, "ann_id": 6, "image_id": 9, "split": "testA", "file_name": "x_2.jpg",
         "sentences": [{"sent_id": 102, "sent": "the man", "raw": "the man"}]},
        {"ref_id": 3, "ann_id": 6, "image_id": 9, "split": "train", "file_name": "x_3.jpg",
         "sentences": [{"sent_id": 103, "sent": "no", "raw": "no"}]},
    ]  # fmt: skip
    path = root / "refs(unc).p"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(refs, protocol=2))
    instances = {
        "images": [{"id": 9, "file_name": "a.jpg", "width": 40, "height": 30}],
        "annotations": [{"id": 5, "bbox": [0, 0, 20, 15]}, {"id": 6, "bbox": [20, 0, 20, 30]}],
    }
    return [path, _write(root / "instances.json", instances)]


def _pope(root: Path) -> list[Path]:
    rows = [
        {"question_id": 1, "image": "COCO_val2014_000000000042.jpg", "label": "yes",
         "text": "Is there a cat in the image?"},
        {"question_id": 2, "image": "COCO_val2014_000000000042.jpg", "label": "no",
         "text": "Is there a dog in the image?"},
    ]  # fmt: skip
    return [_write(root / f"coco_pope_{kind}.json", rows) for kind in ("random", "adversarial")]


def _mm_vet(root: Path) -> list[Path]:
    rows = {
        "v1_0": {"imagename": "a.jpg", "question": "What is x?", "answer": "-1<AND>-5",
                 "capability": ["ocr", "math"]},
        "v1_1": {"imagename": "b.jpg", "question": "Why?", "answer": "fun", "capability": ["rec"]},
    }  # fmt: skip
    return [_write(root / "mm-vet.json", rows)]


def _llava_bench(root: Path) -> list[Path]:
    rows = [{"question_id": 0, "image": "a.jpg", "text": "Describe it.", "category": "conv"}]
    return [_write(root / "questions.jsonl", rows)]


def _conversations(root: Path, answer: str = "7") -> list[Path]:
    rows = [
        {"id": f"c{n}", "source": "t", "style": "chat", "images": [name],
         "messages": [{"role": "user", "content": "<image>\nWhat digit is this?"},
                      {"role": "assistant", "content": answer},
                      {"role": "user", "content": "Sure?"},
                      {"role": "assistant", "content": answer}]}
        for n, name in enumerate(("a.jpg", "b.jpg"))
    ]  # fmt: skip
    return [_write(root / "held.jsonl", rows)]


def _text(root: Path) -> list[Path]:
    rows = [{"question": "Two and two?", "answer": "four"}, {"question": "A?", "answer": "B"}]
    return [_write(root / "plain.jsonl", rows)]


_FILES = {
    "nocaps": _captions,
    "flickr30k": _karpathy,
    "coco_captions": _captions,
    "textcaps": _textcaps,
    "vqav2": _vqa,
    "okvqa": _vqa,
    "textvqa": _textvqa,
    "ocrvqa": _ocrvqa,
    "gqa": _gqa,
    "vizwiz": _vizwiz,
    "tdiuc": lambda root: _vqa(root, humans=1),
    "scienceqa": _scienceqa,
    "visual7w_telling": _telling,
    "refcoco": _refcoco,
    "refcoco+": _refcoco,
    "refcocog": _refcoco,
    "visual7w_pointing": _pointing,
    "pope": _pope,
    "mm_vet": _mm_vet,
    "llava_bench": _llava_bench,
    "exact_match": _conversations,
    "box_iou": lambda root: _conversations(root, "[[100,100,500,500]]"),
    "text_exact_match": _text,
}
