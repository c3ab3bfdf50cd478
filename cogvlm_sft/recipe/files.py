"""Recipe files: where they are found, how their YAML is read, and `key.sub=value` overrides.

Those of training runs and those of data builds are read alike; a build's have `sources`.
YAML is read by its 1.2 rules where 1.1 surprises (`1e-5` is a number, `no` is a string), and a key
may stand only once; PyYAML has no loader for that, so SafeLoader is narrowed here.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cogvlm_sft.errors import RecipeError
from cogvlm_sft.recipe.mistakes import describe


def packaged_recipes() -> dict[str, Path]:
    """Name to file of every recipe that ships with the package (`chat`, `data/chat_500k`, …).

    Those of the data builders are among them; `training_recipes` leaves them out.
    """
    root = _recipes_folder()
    names = {}
    for path in sorted(root.rglob("*.yaml")):
        name = path.relative_to(root).with_suffix("").as_posix()
        if not name.startswith("accelerate/"):  # the launcher's configurations
            names[name] = path
    return names


def training_recipes() -> dict[str, Path]:
    """The packaged recipes that `cogvlm-sft train` takes: those with a `train` section."""
    return {name: path for name, path in packaged_recipes().items() if "train" in read_yaml(path)}


def list_recipes() -> list[tuple[str, str]]:
    """Name and title (first comment line) of every packaged recipe."""
    return [(name, _title(path)) for name, path in packaged_recipes().items()]


def copy_recipe(path_or_name: str | Path, destination: str | Path) -> Path:
    """Copy a recipe to edit it; an existing file is never replaced.

    Raises:
        RecipeError: the recipe is unknown or the destination exists.
    """
    text = find_recipe(path_or_name).read_text(encoding="utf-8")
    target = Path(destination)
    if target.is_dir():
        target = target / f"{Path(path_or_name).stem}.yaml"
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{target} exists; remove it or choose another name") from None
    except OSError as error:
        raise RecipeError(f"{target} cannot be written: {error.strerror}") from None
    return target


def find_recipe(path_or_name: str | Path, folder: str = "") -> Path:
    """The file of a recipe given as path or packaged name; a file at hand comes first.

    Args:
        path_or_name: what a user gives.
        folder: of packaged recipes whose names may leave it out, such as `data`.

    Raises:
        RecipeError: there is none; the nearest name is told.
    """
    path = Path(path_or_name)
    if path.is_file():
        return path
    packaged = packaged_recipes()
    prefix = f"{folder}/" if folder else ""
    known = {n.removeprefix(prefix): p for n, p in packaged.items() if n.startswith(prefix)}
    name = str(path_or_name).removesuffix(".yaml")
    found = known.get(name) or packaged.get(name)
    if found is not None:
        return found
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RecipeError(
        f"no recipe {str(path_or_name)!r}: not a file, and not one of the packaged recipes "
        f"({', '.join(known) or 'none found'}){hint}"
    )


def is_build(tree: Mapping[str, Any]) -> bool:
    """Whether the content of a recipe is that of a data build, not of a training run."""
    return "sources" in tree and "train" not in tree


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML mapping from a file, by the rules of this module's head."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, found {describe(tree)}")
    return tree


def _recipes_folder() -> Path:
    """`_recipes` inside an installed package, `recipes/` beside it in a checkout."""
    here = Path(__file__).resolve().parent.parent
    installed = here / "_recipes"
    return installed if installed.is_dir() else here.parent / "recipes"


def _title(path: Path) -> str:
    """The first sentence of the comment that opens the file."""
    opening = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.lstrip("# ") or not line.startswith("#"):
            break
        opening.append(line.lstrip("# "))
    return re.split(r"(?<=\.)\s", " ".join(opening), maxsplit=1)[0]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 numbers and booleans, refusing a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# PyYAML follows YAML 1.1, where 1e-5 is a string and yes/no/on/off are booleans.
_YAML_1_1 = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")
_StrictLoader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _YAML_1_1]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tTfF")
)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in the raw tree; unknown keys are found by the validation after.

    Items of a list are addressed by number, or by the `name` or `source` that they have.
    """
    dotted, separator, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not separator or not all(keys):
        raise RecipeError(
            f"override {override!r} is not of the form key.sub=value, "
            "for example train.iterations=100"
        )
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not YAML: {error}") from None
    place: Any = tree
    for depth, key in enumerate(keys[:-1]):
        here = ".".join(keys[: depth + 1])
        if isinstance(place, list):
            place = place[_list_index(place, key, override)]
        else:
            if place.get(key) is None:
                place[key] = {}
            place = place[key]
        if not isinstance(place, dict | list):
            raise RecipeError(f"override {override!r}: {here} is {describe(place)}, not a section")
    if isinstance(place, list):
        place[_list_index(place, keys[-1], override)] = value
    else:
        place[keys[-1]] = value


def _list_index(items: list[Any], key: str, override: str) -> int:
    if key.isdigit() and int(key) < len(items):
        return int(key)
    mappings = [item if isinstance(item, dict) else {} for item in items]
    names = [item.get("name") or item.get("source") for item in mappings]
    if names.count(key) == 1:
        return names.index(key)
    known = f"one of the list's items 0 to {len(items) - 1}" if items else "in the empty list"
    named = "".join(f", {name}" for name in names if name)
    raise RecipeError(f"override {override!r}: {key!r} is not {known}{named}")
