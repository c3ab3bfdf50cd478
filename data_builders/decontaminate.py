"""Finds pictures of held-out sets among the training pictures.

By id first: COCO numbers and Visual Genome ids are the same picture whatever the folder or split
name, so a list of ids or file names is cheap and exact. Then, for folders of held-out pictures, by
perceptual hash. LLaVAR's pictures carry twelve-digit names that begin with 1000 and are no COCO
pictures; real COCO numbers stay below a million.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvlm_sft.errors import DataError
from data_builders.annotations import read_records
from data_builders.hash_bands import bands
from data_builders.image_check import ImageLimits
from data_builders.images import SUFFIXES, picture_key
from data_builders.mix import Ledger
from data_builders.picture_shards import check_images
from data_builders.recipe import BuildRecipe, Decontaminate
from data_builders.workfolder import WorkFolder

_COCO_KEYS = ("coco_id", "cocoid")
_KEYS = ("image_id", "image", "imageId", "file_name", "filename", "img_path")
_WRAPPERS = ("images", "data", "questions", "annotations")


def picture_id(name: str, coco: bool = False) -> str:
    """The id that names the same picture in every set.

    Args:
        name: A file name, a path, or a bare id.
        coco: Whether a bare number is a COCO id; it is a Visual Genome id otherwise.
    """
    key = picture_key(name)
    if not (key.isascii() and key.isdigit()):
        return key
    return f"coco:{int(key)}" if (coco or len(key) == 12) and int(key) < 1_000_000 else key


def held_out_ids(path: Path) -> set[str]:
    """Ids in a list: JSON or JSON Lines with a known key, CSV, or one a line of text.

    Bare numbers are COCO ids under `coco_id` and `cocoid`, and if the file's name says `coco`, as
    those of VQAv2, OKVQA and RefCOCO do; they are Visual Genome ids otherwise.

    Raises:
        DataError: The file is missing, or holds no id.
    """
    coco = "coco" in path.name.lower()
    found = {picture_id(name, coco or key in _COCO_KEYS) for key, name in _names(path) if name}
    if not found:
        raise DataError(
            f"{path}: no image id found; expected one a line, or JSON objects with one of "
            f"{', '.join((*_COCO_KEYS, *_KEYS))}"
        )
    return found


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a build must not show, read before the build's own work begins.

    Attributes:
        lists: Ids of each list, by path.
        folders: Picture files of each folder, relative to it, by path.
        twins: COCO id of a Visual Genome id.
    """

    lists: dict[Path, set[str]]
    folders: dict[Path, list[str]]
    twins: dict[str, str]


def read_held_out(rules: Decontaminate) -> HeldOut:
    """Reads the lists, and lists the folders.

    Raises:
        DataError: A list or folder is missing, broken or empty.
    """
    lists: dict[Path, set[str]] = {}
    folders: dict[Path, list[str]] = {}
    for path in rules.against:
        if not path.exists():
            raise DataError(f"decontaminate.against: {path} does not exist")
        if not path.is_dir():
            lists[path] = held_out_ids(path)
            continue
        folders[path] = sorted(
            str(file.relative_to(path))
            for file in path.rglob("*")
            if file.suffix.lower() in SUFFIXES
        )
        if not folders[path]:
            raise DataError(f"{path}: holds no picture to decontaminate against")
    return HeldOut(lists, folders, coco_twins(rules.visual_genome) if rules.visual_genome else {})


@dataclass(frozen=True, slots=True)
class Overlap:
    """Where a build and a held-out set meet.

    Attributes:
        pictures: Picture numbers of the ledger that the set holds.
        unreadable: Pictures of the set that cannot be compared with.
    """

    pictures: set[int]
    unreadable: int = 0


def overlap(
    ledger: Ledger,
    held_out: HeldOut,
    recipe: BuildRecipe,
    hashes: dict[int, int],
    work: WorkFolder,
) -> dict[str, Overlap]:
    """What of the ledger occurs in each held-out set, by path as the recipe lists them.

    Args:
        ledger: The records.
        held_out: The sets.
        recipe: How near a hash must be, and who decodes.
        hashes: Perceptual hash of each picture number; needed for folders only.
        work: Keeps the hashes of held-out pictures.

    Raises:
        DataError: None of a folder's pictures can be read.
    """
    rules = recipe.decontaminate
    ids = [picture_id(path) for path in ledger.pictures]
    found: dict[str, Overlap] = {}
    for place, path in enumerate(rules.against):
        if path in held_out.folders:
            facts = check_images(
                path, held_out.folders[path], ImageLimits(1, float("inf")), True, recipe.workers,
                recipe.engine, work, f"heldout{place:02d}", f"held out: {path.name}",
            )  # fmt: skip
            theirs = [fact.phash for fact in facts if fact.phash is not None]
            if not theirs:
                raise DataError(
                    f"decontaminate.against: none of the {len(facts):,} pictures in {path} can be "
                    "read; fetch them again"
                )
            found[str(path)] = Overlap(_near(hashes, theirs, rules.near), len(facts) - len(theirs))
        else:
            held = held_out.lists[path]
            found[str(path)] = Overlap(
                {
                    number
                    for number, name in enumerate(ids)
                    if name in held or held_out.twins.get(name) in held
                }
            )
    return found


def coco_twins(path: Path) -> dict[str, str]:
    """Visual Genome id to COCO id, for the pictures that both collections hold.

    Args:
        path: Visual Genome's `image_data.json`: objects with `image_id` and `coco_id` or null.

    Raises:
        DataError: The file is missing or broken, or holds no such object.
    """
    twins: dict[str, str] = {}
    rows = 0
    for batch in read_records(path, _WRAPPERS):
        for row in batch.records:
            if isinstance(row, dict) and "image_id" in row and "coco_id" in row:
                rows += 1
                if row["coco_id"] is not None:
                    twins[picture_id(str(row["image_id"]))] = picture_id(str(row["coco_id"]), True)
    if not rows:
        raise DataError(
            f"{path}: expected Visual Genome's image_data.json, objects with image_id and coco_id"
        )
    return twins


def _near(ours: dict[int, int], theirs: list[int], bits: int) -> set[int]:
    table: dict[tuple[int, int], list[int]] = {}
    for value in theirs:
        for band in bands(value, bits):
            table.setdefault(band, []).append(value)
    return {
        number
        for number, value in ours.items()
        if any(
            (value ^ other).bit_count() <= bits
            for band in bands(value, bits)
            for other in table.get(band, ())
        )
    }


def _names(path: Path) -> Iterator[tuple[str, str]]:
    ending = path.suffix.lower()
    if ending in (".json", ".jsonl", ".ndjson"):
        for batch in read_records(path, _WRAPPERS):
            for record in batch.records:
                yield from _names_of(record)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if ending == ".csv":
                for row in csv.DictReader(stream):
                    yield from _names_of(row)
            else:
                for line in stream:
                    yield "", line.strip()
    except FileNotFoundError:
        raise DataError(f"{path}: no such list of held-out images") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; expected one image id a line") from None


def _names_of(record: Any) -> Iterator[tuple[str, str]]:
    """Keys and names of a record: its COCO id, and the first of the other keys that it has."""
    if isinstance(record, str | int):
        yield "", str(record)
    elif isinstance(record, dict):
        for keys in (_COCO_KEYS, (*_KEYS, "id")):
            for key in keys:
                value = record.get(key)
                if isinstance(value, str | int) and not isinstance(value, bool):
                    yield key, str(value)
                    break
