"""Every key of a training recipe in words, from the docstrings of the typed sections."""

import json
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cogvlm_sft.errors import RecipeError
from cogvlm_sft.recipe.mistakes import sections_in
from cogvlm_sft.recipe.sections import Recipe

_INDENT = " " * 4


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its dotted name (N for the number of an item), values, default and meaning."""

    name: str
    values: str
    default: str
    meaning: str

    def __str__(self) -> str:
        meaning = textwrap.fill(
            self.meaning, width=96, initial_indent=_INDENT, subsequent_indent=_INDENT
        )
        return f"{self.name}: {self.values}, {self.default}\n{meaning}"


def recipe_keys(prefix: str = "") -> list[Key]:
    """The keys that begin with a prefix, such as `train` or `tune.language`, in their order.

    Raises:
        RecipeError: there is none.
    """
    keys = list(_keys(Recipe, ""))
    found = [key for key in keys if f"{key.name}.".startswith(f"{prefix}." if prefix else "")]
    if not found:
        sections = ", ".join(Recipe.model_fields)
        raise RecipeError(f"no key of a recipe begins with {prefix!r}; the sections are {sections}")
    return found


def _keys(section: type[BaseModel], prefix: str) -> Iterator[Key]:
    meanings = _meanings(section.__doc__ or "")
    for name, field in section.model_fields.items():
        inner = sections_in(field.annotation)
        if name in meanings:
            default = "required" if field.is_required() else f"default {_plain(field.default)}"
            yield Key(prefix + name, _values(field), default, meanings[name])
        for model in inner:
            many = "N." if "list" in str(field.annotation) else ""
            yield from _keys(model, f"{prefix}{name}.{many}")


def _meanings(docstring: str) -> dict[str, str]:
    """Name to text of the entries under `Attributes:`, which stand eight spaces deep."""
    entries = re.split(r"^ {8}(\w+): ", docstring.partition("Attributes:")[2], flags=re.MULTILINE)
    return {
        name: " ".join(text.split())
        for name, text in zip(entries[1::2], entries[2::2], strict=True)
    }


def _plain(default: Any) -> str:
    if isinstance(default, BaseModel):
        return "as below"
    return json.dumps(default)


_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", dict: "mapping"}


def _values(field: FieldInfo) -> str:
    """What a key takes: kinds of value, or the words it knows."""
    words: list[str] = []

    def walk(annotation: Any) -> None:
        if get_origin(annotation) is Literal:
            words.extend(str(choice) for choice in get_args(annotation))
        elif annotation is types.NoneType:
            words.append("null")
        elif get_origin(annotation) is list:
            words.append("list")
        elif get_origin(annotation) is dict:
            words.append("mapping")
        elif get_args(annotation):
            for part in get_args(annotation):
                walk(part)
        elif isinstance(annotation, type):
            mapping = issubclass(annotation, BaseModel)
            words.append("mapping" if mapping else _WORDS.get(annotation, "path"))

    walk(field.annotation)
    return " | ".join(dict.fromkeys(words))
