"""Which split a file belongs to, and the option that says which splits may enter a build.

Training data is made of `train` alone unless a recipe says otherwise: a build for evaluation names
`val` or `test`. A data set that writes the split into its records is believed; of the others the
file's name is read, and where a name holds several splits, the most held-out one counts.
"""

import re
from typing import Literal

from pydantic import Field, field_validator

from data_builders.recipe import Strict

Split = Literal["train", "val", "test"]

_MEANING: dict[str, Split] = {
    "train": "train", "training": "train", "restval": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "minival": "val",
    "trainval": "val",
    "test": "test", "testdev": "test", "teststd": "test", "testa": "test", "testb": "test",
    "challenge": "test", "submission": "test",
}  # fmt: skip


class SplitOptions(Strict):
    """Options: which splits may enter the build; held-out ones only for evaluation."""

    splits: list[Split] = Field(default=["train"], min_length=1)

    @field_validator("splits", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


def split_named(word: object) -> Split | None:
    """The split that a record's own word means: `train2014`, `testA`, `restval`; None for others.

    Karpathy's `restval` is the part of COCO's val2014 that everyone trains on.
    """
    return _MEANING.get(re.sub(r"\d+$", "", word).lower()) if isinstance(word, str) else None


def split_of_file(name: str) -> Split | None:
    """The split that a file's name tells; None where it tells none."""
    found = {split_named(word) for word in re.split(r"[^A-Za-z0-9]+", name)}
    return next((split for split in ("test", "val", "train") if split in found), None)
