"""Which split a record belongs to, and the option that says which splits may enter a build.

Training data is made of `train` alone unless a recipe says otherwise: a build for evaluation names
`val` or `test`. A data set that writes the split into its records is believed; of the others the
file's name is read, and where a name holds several splits, the most held-out one counts. Flickr30k
tells its splits by lists of pictures beside the data; without any list its records enter, since
that is all that many copies of it hold, but are counted as `split_unknown`.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from cogvlm_sft.errors import DataError
from data_builders.recipe import Strict

Split = Literal["train", "val", "test"]
_SPLITS: tuple[Split, ...] = ("train", "val", "test")

_MEANING: dict[str, Split] = {
    "train": "train", "training": "train", "restval": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "minival": "val",
    "trainval": "val", "eval": "val", "evaluation": "val", "heldout": "val",
    "test": "test", "testdev": "test", "teststd": "test", "testa": "test", "testb": "test",
    "devtest": "test", "challenge": "test", "submission": "test",
}  # fmt: skip


class SplitOptions(Strict):
    """Options.

    Attributes:
        splits: Which splits may enter: train, val, test. Held-out ones only for evaluation.
    """

    splits: list[Split] = Field(default=["train"], min_length=1)

    @field_validator("splits", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


def split_named(word: object) -> Split | None:
    """The split that a record's own word means: `train2014`, `testA`, `restval`; None for others.

    Karpathy's `restval` is the part of COCO's val2014 that everyone trains on.
    """
    if not isinstance(word, str):
        return None
    return _MEANING.get(re.sub(r"\d+$|[-_ ]", "", word.strip()).lower())


def split_of_file(name: str) -> Split | None:
    """The split that a file's name tells; None where it tells none."""
    found = {split_named(word) for word in re.split(r"[^A-Za-z0-9]+", name)}
    return next((split for split in ("test", "val", "train") if split in found), None)


class SplitLists:
    """Splits told by lists of picture ids: `train.txt`, `val.txt`, `test.txt`.

    Attributes:
        known: Whether there is any list.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        """Reads those of the files that are lists.

        Raises:
            DataError: A list is no text.
        """
        lists = {path.stem: path for path in files if is_split_list(path)}
        self.known = bool(lists)
        # An id in two lists counts as held out; with both held-out lists there, the rest trains.
        self._rest: Split | None = "train" if {"val", "test"} == set(lists) else None
        self._splits: dict[str, Split] = {}
        for split in _SPLITS:
            if split in lists:
                ids = re.findall(r"^\s*(\d+)", _text(lists[split]), re.MULTILINE)
                self._splits |= dict.fromkeys(ids, split)

    def of(self, identity: str) -> Split | None:
        """The split of a picture; None where the lists do not tell."""
        return self._splits.get(identity, self._rest)


def is_split_list(path: Path) -> bool:
    """Whether a file is called as a list of a split's pictures."""
    return path.suffix == ".txt" and path.stem in _SPLITS


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; fetch it again") from None
