"""What is wrong with a recipe, in words: one line a mistake, with the nearest key that exists."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError


def explain(
    error: ValidationError, schema: type[BaseModel], source: str, overridden: Iterable[str]
) -> str:
    """One line per mistake: key, found, expected, nearest key, and where it was written.

    Args:
        error: of validating a tree against `schema`.
        schema: the typed recipe; its keys are what a near miss is compared with.
        source: file of the tree.
        overridden: `key.sub=value` strings that were applied to it.
    """
    lines, last_first = [], list(overridden)[::-1]  # of two for one key the last one counts
    for item in error.errors():
        location = tuple(item["loc"])
        dotted = ".".join(str(part) for part in location if part != "[key]")
        where = next(
            (f"override {text!r}" for text in last_first if _same_key(text, dotted)), source
        )
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key {dotted!r}; {_nearest(location, schema)}")
        elif item["type"] == "missing":
            lines.append(f"{where}: key {dotted!r} is missing and has no default")
        elif item["type"] == "value_error":
            lines.append(f"{where}: {dotted}: {item['ctx']['error']}")
        else:
            found = describe(item["input"])
            lines.append(f"{where}: {dotted} is {found}; expected {_wanted(item)}")
    return "\n".join(lines)


def _wanted(item: Mapping[str, Any]) -> str:
    """What pydantic expected, without its class names."""
    if item["type"] == "model_type":
        return "a mapping of keys"
    if item["type"].startswith("path"):
        return "a path (a string)"
    if item["type"] in ("too_short", "too_long"):
        limits = item["ctx"]
        bound = limits.get("min_length", limits.get("max_length"))
        least = "at least " if item["type"] == "too_short" else ""
        return f"{least}{bound} item(s), found {limits['actual_length']}"
    message: str = item["msg"]
    return message.removeprefix("Input should be ").removeprefix("a valid ")


def _same_key(override: str, dotted: str) -> bool:
    key = override.partition("=")[0].strip()
    return key == dotted or key.startswith(dotted + ".") or dotted.startswith(key + ".")


def _nearest(location: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """The known key nearest to an unknown one: of its own section first, then of any other."""
    known = _known_keys(schema)
    parent = ".".join(re.sub(r"^\d+$", "*", str(part)) for part in location[:-1])
    wanted = str(location[-1])
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    near = difflib.get_close_matches(wanted, siblings, n=1, cutoff=0.6)
    if near:
        return f"did you mean {siblings[near[0]]!r}?"
    elsewhere = {key.rpartition(".")[2]: key for key in known}
    near = difflib.get_close_matches(wanted, elsewhere, n=1, cutoff=0.8)
    if near:
        return f"did you mean {elsewhere[near[0]]!r}?"
    near = difflib.get_close_matches(wanted, siblings, n=1, cutoff=0.0)
    return f"the nearest is {siblings[near[0]]!r}, of {', '.join(siblings)}"


def _known_keys(schema: type[BaseModel]) -> list[str]:
    """Every dotted key of the schema; the items of a list are written `*`."""
    keys: list[str] = []

    def walk(section: type[BaseModel], prefix: str) -> None:
        for name, field in section.model_fields.items():
            keys.append(prefix + name)
            for inner in sections_in(field.annotation):
                is_list = "list" in str(field.annotation)
                walk(inner, f"{prefix}{name}." + ("*." if is_list else ""))

    walk(schema, "")
    return keys


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The typed sections that an annotation such as `list[Source] | None` mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in sections_in(part)]


def describe(value: Any) -> str:
    """A value as a user would describe it: `8 (an integer)`."""
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "a mapping",
    }
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({names.get(type(value), 'a value')})"
