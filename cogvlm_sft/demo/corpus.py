"""The demo's corpus: pictures, and raw annotation files in the shapes of released data sets.

Real pictures come from packages that are installed anyway: scikit-learn's 1,797 handwritten digits
(UCI Optical Recognition of Handwritten Digits) and its two photos, scikit-image's photos; signs and
shapes are drawn (`demo.drawn`). Questions and answers are ours and true. Notable choices: package
files are found by path, nothing is imported and nothing downloaded; the raw files are LLaVA JSON
(half of the markers first, half last, as released) and the tables of the custom source, and the
real builders turn them into conversations; splits are fixed by a seed before anything is drawn, and
a held-out digit, word, number or arrangement never occurs in training; validation is a split of its
own, on which the demo's settings were chosen.

Layout below the output folder: `images/TASK/SPLIT/NNNNN.png` and `raw/FILE`.
"""

import csv
import gzip
import importlib.util
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cogvlm_sft.demo.drawn import (
    DIGITS,
    LETTERS,
    PICTURE_SIZE,
    draw_shapes,
    draw_sign,
    random_shapes,
)
from cogvlm_sft.errors import DataError

SPLITS = ("train", "validation", "heldout")
HELD_OUT_DIGITS = 360
VALIDATION_DIGITS = 180
HELD_OUT_DRAWN = 200
VALIDATION_DRAWN = 200
# Held-out signs are these words and as many numbers, the rest codes such as K7; training reads
# other pairs of characters and single ones.
_WORD_LINE = (
    "AM AN AS AT AX BE BY DO GO HE HI IF IN IS IT ME MY NO OF OH OK ON OR OX PI SO TO UP US WE"
)
WORDS = tuple(_WORD_LINE.split())

_BOARD, _CHALK = (0, 0, 0), 255
# Share of the training pictures of shapes that ask for the name of a box instead of the box of a
# name: without them the model finds both shapes and cannot tell which one was meant.
_NAMED = 0.4

# File of the package, what the picture shows, and one more true question about it.
_PHOTOS = (
    ("skimage", "data/astronaut.png", "an astronaut", "What color is the suit?", "orange"),
    ("skimage", "data/chelsea.png", "a cat", "Is it an animal?", "yes"),
    ("skimage", "data/coffee.png", "a cup of coffee", "Can you drink it?", "yes"),
    ("skimage", "data/rocket.jpg", "a rocket", "Can it fly?", "yes"),
    ("skimage", "data/hubble_deep_field.jpg", "galaxies", "What color is the sky?", "black"),
    ("skimage", "data/motorcycle_left.png", "a motorcycle", "Is it an animal?", "no"),
    ("skimage", "data/camera.png", "a man with a camera", "Is the picture in color?", "no"),
    ("skimage", "data/coins.png", "coins", "Is the picture in color?", "no"),
    ("skimage", "data/brick.png", "a brick wall", "Is it an animal?", "no"),
    ("skimage", "data/grass.png", "grass", "Is the picture in color?", "no"),
    ("sklearn", "datasets/images/china.jpg", "a temple", "Is it a building?", "yes"),
    ("sklearn", "datasets/images/flower.jpg", "a flower", "Is it a plant?", "yes"),
)
_DIGIT_QUESTIONS = (
    "What digit is this?",
    "Which digit is written here?",
    "Which number do you see?",
)
_SIGN_QUESTIONS = ("What does the sign say?", "What is written here?")
_PHOTO_QUESTION = "What is in the picture?"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many pictures are made for training; held-out counts are fixed.

    Attributes:
        digit_copies: Written copies of each training digit; all but the first are tilted and moved.
        signs: Signs to read.
        shapes: Arrangements of shapes.
        photo_crops: Crops of each photo.
    """

    digit_copies: int = 3
    signs: int = 7_000
    shapes: int = 8_000
    photo_crops: int = 24


DEFAULT_SIZES = Sizes()


@dataclass(frozen=True, slots=True)
class Example:
    """A picture with questions and true answers.

    Attributes:
        task: `digits`, `reading`, `boxes` or `photos`.
        split: One of `SPLITS`.
        image: Path of the picture, relative to the image root.
        base: (phrase, answer) pairs of the pretraining stage.
        rounds: (question, answer) pairs of the alignment stage and of the held-out questions.
        key: What may not occur in two splits: the digit's row, the text, the arrangement.
    """

    task: str
    split: str
    image: str
    base: tuple[tuple[str, str], ...]
    rounds: tuple[tuple[str, str], ...]
    key: str


def make_corpus(out: Path, sizes: Sizes = DEFAULT_SIZES, seed: int = 0) -> list[Example]:
    """Draws all pictures and writes all raw annotation files.

    Args:
        out: Gets `images/` and `raw/`.
        sizes: How much to make.
        seed: Decides every split, picture and wording.

    Raises:
        DataError: A package whose pictures are needed is not installed.
    """
    examples = [
        *_digits(out, sizes, random.Random(f"digits {seed}")),
        *_signs(out, sizes, random.Random(f"reading {seed}")),
        *_shapes(out, sizes, random.Random(f"boxes {seed}")),
        *_photos(out, sizes, random.Random(f"photos {seed}")),
    ]
    write_raw(out / "raw", examples)
    return examples


def write_raw(folder: Path, examples: Sequence[Example]) -> None:
    """Raw annotation files: `STAGE_TASK.json|csv|jsonl`, stages being pretrain, chat and splits."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage, split in (
        ("pretrain", "train"),
        ("chat", "train"),
        ("validation", "validation"),
        ("heldout", "heldout"),
    ):
        for task in ("digits", "reading", "boxes", "photos"):
            rows = [
                (example.image, example.base if stage == "pretrain" else example.rounds)
                for example in examples
                if example.task == task and example.split == split
            ]
            if task in ("digits", "photos"):
                _write_llava(folder / f"{stage}_{task}.json", rows)
            elif task == "reading":
                _write_table(folder / f"{stage}_{task}.csv", rows)
            else:
                _write_lines(folder / f"{stage}_{task}.jsonl", rows)


def package_file(package: str, relative: str) -> Path:
    """A file inside an installed package, found without importing it.

    Raises:
        DataError: The package or the file is not there.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / relative
        if path.is_file():
            return path
    name = {"sklearn": "scikit-learn", "skimage": "scikit-image"}.get(package, package)
    raise DataError(
        f"the demo's pictures come from {name}, and {package}/{relative} is not installed; "
        f"install it with: pip install {name}"
    )


def read_digits() -> list[tuple[list[int], int]]:
    """scikit-learn's handwritten digits: 64 grey values from 0 to 16 row by row, and the digit."""
    rows = []
    path = package_file("sklearn", "datasets/data/digits.csv.gz")
    with gzip.open(path, "rt", encoding="ascii") as stream:
        for line in stream:
            values = [int(float(value)) for value in line.split(",")]
            rows.append((values[:64], values[64]))
    return rows


def split_digits(count: int, seed: str = "digits split") -> dict[str, list[int]]:
    """Row numbers of each split; 360 are held out, 180 of the others are for validation."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    first, second = HELD_OUT_DIGITS, HELD_OUT_DIGITS + VALIDATION_DIGITS
    return {
        "heldout": sorted(order[:first]),
        "validation": sorted(order[first:second]),
        "train": sorted(order[second:]),
    }


def _digits(out: Path, sizes: Sizes, rng: random.Random) -> Iterable[Example]:
    rows = read_digits()
    for split, members in split_digits(len(rows)).items():
        names = _Names(out, "digits", split)
        for row in members:
            values, label = rows[row]
            plain = Image.frombytes("L", (8, 8), bytes(min(255, value * 16) for value in values))
            plain = plain.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC)
            for copy in range(sizes.digit_copies if split == "train" else 1):
                written = plain if copy == 0 else _moved(plain, rng)
                board = Image.new("RGB", plain.size, _BOARD)
                board.paste((_CHALK, _CHALK, _CHALK), mask=written)
                question = rng.choice(_DIGIT_QUESTIONS) if split == "train" else None
                yield Example(
                    "digits",
                    split,
                    names.save(board),
                    (("the digit", str(label)),),
                    ((question or _DIGIT_QUESTIONS[0], str(label)),),
                    f"digit {row}",
                )


def _moved(picture: Image.Image, rng: random.Random) -> Image.Image:
    tilt, dx, dy = rng.uniform(-9, 9), rng.randint(-4, 4), rng.randint(-4, 4)
    return picture.rotate(tilt, Image.Resampling.BILINEAR, translate=(dx, dy))


def _signs(out: Path, sizes: Sizes, rng: random.Random) -> Iterable[Example]:
    pairs = [one + two for one in LETTERS + DIGITS for two in LETTERS + DIGITS]
    # Halves of coordinates, which the tokenizer holds whole, would not be spelled.
    pairs = [pair for pair in pairs if pair not in ("00", "25", "50", "75", "99")]
    rng.shuffle(pairs)
    numbers = [pair for pair in pairs if pair.isdecimal()][: len(WORDS)]
    codes = [pair for pair in pairs if not pair.isdecimal() and pair not in WORDS]
    rest = HELD_OUT_DRAWN - len(WORDS) - len(numbers)
    texts = {
        "heldout": [*WORDS, *numbers, *codes[:rest]],
        "validation": codes[rest : rest + VALIDATION_DRAWN],
    }
    apart = {*texts["heldout"], *texts["validation"]}
    singles = LETTERS + DIGITS
    known = [pair for pair in pairs if pair not in apart]
    # A character alone is the easy lesson that pairs are learned from.
    texts["train"] = [
        rng.choice(singles) if rng.random() < 0.3 else rng.choice(known) for _ in range(sizes.signs)
    ]
    for split in SPLITS:
        names = _Names(out, "reading", split)
        for text in texts[split]:
            question = rng.choice(_SIGN_QUESTIONS) if split == "train" else _SIGN_QUESTIONS[0]
            image = names.save(draw_sign(text, rng))
            yield Example(
                "reading", split, image, (("the sign", text),), ((question, text),), f"sign {text}"
            )


def _shapes(out: Path, sizes: Sizes, rng: random.Random) -> Iterable[Example]:
    counts = {"heldout": HELD_OUT_DRAWN, "validation": VALIDATION_DRAWN, "train": sizes.shapes}
    seen: set[str] = set()
    for split, count in counts.items():
        names = _Names(out, "boxes", split)
        made = 0
        while made < count:
            # One shape alone is the easy lesson that finding one of two is learned from. There are
            # only 288 of them: they come back, the held-out pairs never do.
            shapes = random_shapes(rng, rng.choice((1, 2)) if split == "train" else 2)
            key = " ".join(sorted(f"{shape.name} {shape.box()}" for shape in shapes))
            if len(shapes) > 1 and key in seen:
                continue
            seen.add(key)
            made += 1
            shape, place = shapes[0], shapes[0].box()
            base, question = (shape.name, place), (f"Where is the {shape.name}?", place)
            if split == "train" and rng.random() < _NAMED:
                base, question = (place, shape.name), (f"What is at {place}?", shape.name)
            image = names.save(draw_shapes(shapes, rng))
            yield Example("boxes", split, image, (base,), (question,), key)


def _photos(out: Path, sizes: Sizes, rng: random.Random) -> Iterable[Example]:
    for package, relative, thing, question, answer in _PHOTOS:
        with Image.open(package_file(package, relative)) as opened:
            photo = opened.convert("RGB")
        photo.thumbnail((160, 160))
        for split, count in (("train", sizes.photo_crops), ("validation", 2), ("heldout", 2)):
            names = _Names(out, "photos", split, start=Path(relative).stem)
            for _ in range(count):
                side = round(min(photo.size) * rng.uniform(0.8, 1.0))
                x = rng.randint(0, photo.width - side)
                y = rng.randint(0, photo.height - side)
                crop = photo.crop((x, y, x + side, y + side))
                image = names.save(crop.resize((PICTURE_SIZE, PICTURE_SIZE)))
                rounds: tuple[tuple[str, str], ...] = ((_PHOTO_QUESTION, thing),)
                if split == "train":
                    rounds += ((question, answer),)
                base = (("the picture", thing),)
                yield Example("photos", split, image, base, rounds, f"{image}")


class _Names:
    """Saves pictures under running numbers and gives their paths below the image root."""

    def __init__(self, out: Path, task: str, split: str, start: str = "") -> None:
        self.root = out / "images"
        self.folder = f"{task}/{split}"
        self.start = f"{start}_" if start else ""
        self.count = 0
        (self.root / self.folder).mkdir(parents=True, exist_ok=True)

    def save(self, picture: Image.Image) -> str:
        relative = f"{self.folder}/{self.start}{self.count:05d}.png"
        picture.save(self.root / relative, compress_level=1)
        self.count += 1
        return relative


Rows = Sequence[tuple[str, tuple[tuple[str, str], ...]]]


def _write_llava(path: Path, rows: Rows) -> None:
    """LLaVA JSON; every other marker ends its question, as in the released files."""
    records = []
    for number, (image, rounds) in enumerate(rows):
        turns = []
        for turn, (question, answer) in enumerate(rounds):
            if turn == 0:
                question = f"{question}\n<image>" if number % 2 else f"<image>\n{question}"
            turns.append({"from": "human", "value": question})
            turns.append({"from": "gpt", "value": answer})
        records.append({"id": Path(image).stem, "image": image, "conversations": turns})
    path.write_text(json.dumps(records, indent=0), encoding="utf-8")


def _write_table(path: Path, rows: Rows) -> None:
    """CSV of the custom source: image, question, answer."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image", "question", "answer"))
        for image, rounds in rows:
            writer.writerows((image, question, answer) for question, answer in rounds)


def _write_lines(path: Path, rows: Rows) -> None:
    """JSON Lines of the custom source: turns of a picture."""
    with path.open("w", encoding="utf-8") as stream:
        for image, rounds in rows:
            turns = [{"question": question, "answer": answer} for question, answer in rounds]
            stream.write(json.dumps({"image": image, "turns": turns}) + "\n")
