"""The build recipe: a typed YAML file that says which sources are merged and how.

It is found, read and overridden as training recipes are (`cogvlm_sft.recipe`), and mistakes are
told in the same words. Each source adds options of its own (columns, question files), checked
against the model that the source declares. Paths are relative to the working directory.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from cogvlm_sft.errors import RecipeError
from cogvlm_sft.recipe.files import apply_override, find_recipe, read_yaml
from cogvlm_sft.recipe.mistakes import explain


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
    """How pictures are looked at: `check: false` takes every path as the annotation gives it.

    Pillow opens none of more than 178,956,970 pixels, for training neither.
    """

    check: bool = True
    min_side: int = Field(default=28, ge=1)
    max_aspect: float = Field(default=200.0, ge=1)
    max_pixels: int = Field(default=89_000_000, ge=1, le=178_956_970)


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


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> BuildRecipe:
    """Reads a build recipe.

    Args:
        path_or_name: File, or name of a packaged recipe, such as `chat_500k`.
        overrides: `key.sub=value` strings; values are YAML.

    Raises:
        RecipeError: Missing file, broken YAML, unknown key, wrong type or value.
    """
    path = find_recipe(path_or_name, "data")
    content = read_yaml(path)
    if "train" in content:
        raise RecipeError(
            f"{path}: describes a training run; `cogvlm-sft train {path_or_name}` starts it, and a "
            "build recipe has `sources`"
        )
    for override in overrides:
        apply_override(content, override)
    return parse_recipe(content, str(path), overrides)


def parse_recipe(
    content: dict[str, Any], where: str, overridden: Sequence[str] = ()
) -> BuildRecipe:
    """Validates a recipe's content; see `load_recipe`."""
    try:
        recipe = BuildRecipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(explain(error, BuildRecipe, where, overridden)) from None
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
        keys = create_model("Entry", __base__=(model, SourceEntry))
        place = f"{where}: source {entry.name or entry.source}"
        raise RecipeError(explain(error, keys, place, ())) from None


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or the list of what is known."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
