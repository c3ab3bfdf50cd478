"""The build recipe: a typed YAML file that says which sources are merged and how.

An unknown key is an error that names the nearest known one; `key.sub=value` overrides reach every
value, sources by name or number. Each source adds options of its own (columns, question files),
checked against the model that the source declares. Paths are relative to the working directory.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cogvlm_sft.errors import RecipeError


class Strict(BaseModel):
    """A model whose unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class SourceEntry(BaseModel):
    """One source of a build; further keys belong to the source's own options.

    Attributes:
        source: Module name in `data_builders.sources`.
        name: Its name in records and reports; the source's name unless several are listed.
        annotations: Annotation files.
        images: Folders that hold its pictures, inside the image root; none means the root.
        style: Prompt style, where it should differ from the source's own.
        max: At most so many conversations are written, chosen by hash; counted after the weight.
        weight: How often each conversation is written: 0.5 keeps half of them, 2 writes each twice.
        quota: Exactly so many conversations, repeated where the source holds fewer; a source that
            has none left is an error.
    """

    model_config = ConfigDict(extra="allow")

    source: str
    name: str = ""
    annotations: list[Path] = []
    images: list[Path] = []
    style: Literal["chat", "vqa", "base"] | None = None
    max: int | None = Field(default=None, ge=1)
    weight: float = Field(default=1.0, gt=0, le=1000)
    quota: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_way_to_mix(self) -> "SourceEntry":
        if self.quota is not None and not (self.max is None and self.weight == 1):
            raise ValueError("`quota` says it all; leave out `max` and `weight`")
        return self

    @field_validator("annotations", "images", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value


class ImageRules(Strict):
    """How pictures are looked at: `check: false` takes every path as the annotation gives it."""

    check: bool = True
    min_side: int = Field(default=28, ge=1)
    max_aspect: float = Field(default=200.0, ge=1)
    max_pixels: int = Field(default=89_000_000, ge=1)


class Deduplicate(Strict):
    """`text`: same texts, same picture; `near`: same texts, pictures within so many hash bits.

    The same picture is the same path, or where pictures are checked, a file of the same bytes.
    """

    text: bool = True
    near: int | None = Field(default=None, ge=0, le=16)


class Decontaminate(Strict):
    """Held-out pictures: files of ids or names, or folders of pictures.

    Attributes:
        against: JSON, JSON Lines, text or CSV files of image ids, or folders of pictures.
        mode: `report` counts the overlap, `drop` takes it out.
        near: Hash bits within which a folder's picture counts as the same.
        visual_genome: Visual Genome's `image_data.json`, which says which of its pictures are COCO
            pictures; lists of COCO ids then reach Visual Genome names too.
    """

    against: list[Path] = []
    mode: Literal["report", "drop"] = "drop"
    near: int = Field(default=4, ge=0, le=16)
    visual_genome: Path | None = None


class BuildRecipe(Strict):
    """A whole build; see `SourceEntry` for the sources.

    Attributes:
        out: The build folder; replaced as a whole when the build is complete.
        image_root: What image paths in records are relative to; the image folders' common parent
            unless given.
        seed: Decides the order, and which conversations a cap keeps.
        shard_size: Conversations a file.
        workers: Processes for records and pictures; the result does not depend on it.
        engine: `local`, or `ray` for a Ray cluster (extra `ray`); nor does it depend on this.
        commercial: Whether the build is for commercial use, which some licences forbid: their
            sources are refused.
        tokenizer: A `tokenizer.json`, or a folder with one: the report counts tokens of answers
            instead of characters.
    """

    out: Path
    sources: list[SourceEntry] = Field(min_length=1)
    image_root: Path | None = None
    seed: int = 0
    shard_size: int = Field(default=50_000, ge=1)
    workers: int = Field(default=2, ge=1, le=256)
    engine: Literal["local", "ray"] = "local"
    commercial: bool = False
    tokenizer: Path | None = None
    images: ImageRules = ImageRules()
    deduplicate: Deduplicate = Deduplicate()
    decontaminate: Decontaminate = Decontaminate()

    @field_validator("deduplicate", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, bool) else value

    @field_validator("images", mode="before")
    @classmethod
    def _check_switch(cls, value: Any) -> Any:
        return {"check": value} if isinstance(value, bool) else value


def source_names() -> list[str]:
    """Names of all sources, one for each module of `data_builders.sources`."""
    package = importlib.import_module("data_builders.sources")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find_recipe(name: str | Path) -> Path:
    """A recipe file by path, or a packaged data recipe by name.

    Raises:
        RecipeError: There is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    home = Path(__file__).resolve().parents[1]
    folders = (home / "recipes" / "data", home / "cogvlm_sft" / "_recipes" / "data")
    for folder in folders:
        packaged = folder / f"{path.name.removesuffix('.yaml')}.yaml"
        if len(path.parts) == 1 and packaged.is_file():
            return packaged
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise RecipeError(f"{name}: no such build recipe; packaged ones are {', '.join(known)}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> BuildRecipe:
    """Reads a build recipe.

    Args:
        path: File, or name of a packaged recipe.
        overrides: `key.sub=value` strings; values are YAML.

    Raises:
        RecipeError: Missing file, broken YAML, unknown key, wrong type or value.
    """
    file = find_recipe(path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: expected keys such as `sources` and `out`, found {content!r}")
    for override in overrides:
        _override(content, override)
    return parse_recipe(content, str(file))


def parse_recipe(content: dict[str, Any], where: str) -> BuildRecipe:
    """Validates a recipe's content; see `load_recipe`."""
    try:
        recipe = BuildRecipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error, BuildRecipe)}") from None
    used: set[str] = set()
    for entry in recipe.sources:
        if entry.source not in source_names():
            raise RecipeError(
                f"{where}: unknown source {entry.source!r}{nearest(entry.source, source_names())}"
            )
        entry.name = entry.name or entry.source
        if entry.name in used:
            raise RecipeError(
                f"{where}: two sources are called {entry.name!r}; give each its own `name`"
            )
        if not entry.name.replace("_", "").replace("-", "").replace(".", "").isalnum():
            raise RecipeError(f"{where}: source name {entry.name!r}: use letters, digits, - and _")
        used.add(entry.name)
        options(entry, where)
    return recipe


def options(entry: SourceEntry, where: str = "recipe") -> Any:
    """The source's own options, validated.

    Raises:
        RecipeError: A key is neither a general one nor one of this source.
    """
    model = importlib.import_module(f"data_builders.sources.{entry.source}").SOURCE.Options
    try:
        return model.model_validate(entry.model_extra or {})
    except ValidationError as error:
        known = [*SourceEntry.model_fields, *model.model_fields]
        text = _explain(error, model, known)
        raise RecipeError(f"{where}: source {entry.name or entry.source}: {text}") from None


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or the list of what is known."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override!r}: an override reads key.sub=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"{override!r}: the value is not valid YAML") from None
    *path, last = key.split(".")
    spot: Any = content
    for part in path:
        if isinstance(spot, list):
            spot = _listed_source(spot, part, override)
        else:
            if not isinstance(spot.get(part), dict | list):
                spot[part] = {}
            spot = spot[part]
        if not isinstance(spot, dict | list):
            raise RecipeError(f"{override!r}: {part!r} is {spot!r}, which holds no keys")
    if isinstance(spot, list):
        if not last.isdigit() or int(last) >= len(spot):
            raise RecipeError(f"{override!r}: the list has {len(spot)} entries, counted from 0")
        spot[int(last)] = value
    else:
        spot[last] = value


def _listed_source(entries: list[Any], part: str, override: str) -> Any:
    if part.isdigit() and int(part) < len(entries):
        return entries[int(part)]
    for entry in entries:
        if isinstance(entry, dict) and part in (entry.get("name"), entry.get("source")):
            return entry
    names = [e.get("name") or e.get("source") for e in entries if isinstance(e, dict)]
    raise RecipeError(f"{override!r}: no source {part!r}; the recipe has {names}")


def _explain(error: ValidationError, model: type[BaseModel], known: Sequence[str] = ()) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        inner: Any = model
        for part in first["loc"][:-1]:
            field = inner.model_fields.get(part) if hasattr(inner, "model_fields") else None
            inner = field.annotation if field else inner
        names = list(known) or list(inner.model_fields)
        return f"unknown key {place!r}{nearest(str(first['loc'][-1]), names)}"
    if first["type"] == "missing":
        return f"{place} is missing"
    return f"{place}: {first['msg']}, found {first['input']!r}"
