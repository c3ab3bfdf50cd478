"""The corpus: fixed splits, nothing held out in training, true boxes, the same bytes twice."""

import csv
import hashlib
import json
import random
from pathlib import Path

import pytest
from PIL import Image

from cogvlm_sft.demo import corpus
from cogvlm_sft.demo.corpus import Example, Sizes, make_corpus, package_file, split_digits
from cogvlm_sft.demo.drawn import COLORS, PICTURE_SIZE, box_text, draw_shapes, random_shapes
from cogvlm_sft.demo.run import training_texts
from cogvlm_sft.demo.tokenizer import train_tokenizer
from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.metrics.boxes import parse_boxes

SMALL = Sizes(digit_copies=1, signs=120, shapes=60, photo_crops=2)
Made = tuple[Path, list[Example]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    out = tmp_path_factory.mktemp("corpus")
    return out, make_corpus(out, SMALL)


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def test_the_same_seed_gives_the_same_bytes(made: Made, tmp_path: Path) -> None:
    make_corpus(tmp_path, SMALL)
    assert _digest(made[0]) == _digest(tmp_path)


def test_splits_share_nothing(made: Made) -> None:
    for task in ("digits", "reading", "boxes", "photos"):
        keys = {
            split: {e.key for e in made[1] if e.task == task and e.split == split}
            for split in corpus.SPLITS
        }
        assert all(keys.values())
        assert not keys["train"] & keys["heldout"]
        assert not keys["train"] & keys["validation"]
        assert not keys["validation"] & keys["heldout"]


def test_digit_split_is_fixed_and_covers_every_row() -> None:
    split = split_digits(1797)
    assert [len(split[name]) for name in ("train", "validation", "heldout")] == [1257, 180, 360]
    assert sorted(row for rows in split.values() for row in rows) == list(range(1797))
    assert split["heldout"][:5] == split_digits(1797)["heldout"][:5]


def test_raw_files_of_training_name_no_held_out_picture(made: Made) -> None:
    held = {e.image for e in made[1] if e.split != "train"}
    for stage in ("pretrain", "chat"):
        for file in (made[0] / "raw").glob(f"{stage}_*"):
            text = file.read_text(encoding="utf-8")
            assert not [image for image in held if image in text]


def test_no_held_out_sign_reaches_the_training_texts(made: Made) -> None:
    texts = training_texts(made[1])
    spoken = {word for text in texts for word in text.split()}
    held = {e.rounds[0][1] for e in made[1] if e.task == "reading" and e.split == "heldout"}
    assert len(held) == 200
    assert not held & spoken


def test_raw_shapes_are_the_released_ones(made: Made) -> None:
    raw = made[0] / "raw"
    records = json.loads((raw / "chat_digits.json").read_text(encoding="utf-8"))
    first = [record["conversations"][0]["value"] for record in records]
    ends = sum(value.endswith("\n<image>") for value in first)
    assert sum(value.startswith("<image>\n") for value in first) + ends == len(first)
    assert abs(ends - len(first) / 2) <= 1
    assert {turn["from"] for record in records for turn in record["conversations"]} == {
        "human",
        "gpt",
    }
    with (raw / "heldout_reading.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 200
    assert set(rows[0]) == {"image", "question", "answer"}
    lines = (raw / "chat_boxes.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == SMALL.shapes
    assert len(json.loads(lines[0])["turns"]) in (1, 2)


def test_digits_are_the_real_ones(made: Made) -> None:
    rows = corpus.read_digits()
    assert len(rows) == 1797
    assert [label for _, label in rows[:10]] == list(range(10))
    held = [e for e in made[1] if e.task == "digits" and e.split == "heldout"]
    assert len(held) == 360
    for example in held[:20]:
        row = int(example.key.split()[1])
        assert example.rounds[0][1] == str(rows[row][1])


def test_boxes_are_true() -> None:
    """Inside a box its colour is found, and nowhere outside of all boxes of that colour."""
    rng = random.Random(3)
    for _ in range(20):
        shapes = random_shapes(rng, 3)
        picture = draw_shapes(shapes, rng)
        for shape in shapes:
            near = [
                (x, y)
                for x in range(PICTURE_SIZE)
                for y in range(PICTURE_SIZE)
                if _close(picture.getpixel((x, y)), COLORS[shape.color])
            ]
            x0, y0 = min(x for x, _ in near), min(y for _, y in near)
            x1, y1 = max(x for x, _ in near) + 1, max(y for _, y in near) + 1
            assert box_text((x0, y0, x1, y1), picture.size) == shape.box()


def _close(one: object, other: tuple[int, int, int]) -> bool:
    assert isinstance(one, tuple)
    return all(abs(a - b) <= 12 for a, b in zip(one, other, strict=True))


def test_box_text_is_the_floor_in_thousandths() -> None:
    assert box_text((0, 14, 28, 56), (56, 56)) == "[[000,250,500,999]]"
    assert box_text((1, 1, 2, 2), (3, 3)) == "[[333,333,666,666]]"
    assert parse_boxes(box_text((10, 20, 30, 40), (100, 100))) == [(100, 200, 300, 400)]


def test_a_missing_package_is_named() -> None:
    with pytest.raises(DataError, match="pip install scikit-learn"):
        package_file("sklearn", "datasets/data/none.csv")
    with pytest.raises(DataError, match="pip install nowhere"):
        package_file("nowhere", "x.png")


def test_pictures_are_whole(made: Made) -> None:
    for example in made[1][::50]:
        with Image.open(made[0] / "images" / example.image) as picture:
            picture.load()
            assert picture.size == (PICTURE_SIZE, PICTURE_SIZE)


def test_tokenizer_is_of_llamas_kind_and_spells(made: Made, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = train_tokenizer(training_texts(made[1]), tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 0
    assert tokenizer.is_fast and len(tokenizer) <= 512
    box = tokenizer.tokenize("[[000,250,500,999]]", add_special_tokens=False)
    # Coordinates are whole pieces, and a sign's characters are spelled.
    assert len(box) <= 10
    held = [e.rounds[0][1] for e in made[1] if e.task == "reading" and e.split == "heldout"]
    for text in held:
        pieces = tokenizer.tokenize(text, add_special_tokens=False)
        assert pieces[-1] == text[-1] and "".join(pieces) == f"\u2581{text}"
    for text in ("Where is the red square?", "猫 😀", "K7 27"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
