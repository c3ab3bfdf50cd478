"""A recipe from its file, with overrides: read, typed, checked, every mistake in words."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cogvlm_sft.errors import RecipeError
from cogvlm_sft.recipe.files import apply_override, find_recipe, is_build, read_yaml
from cogvlm_sft.recipe.mistakes import explain
from cogvlm_sft.recipe.rules import check_together
from cogvlm_sft.recipe.sections import Recipe


def load_recipe(path_or_name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and check a training recipe.

    Args:
        path_or_name: a YAML file, or the name of a packaged recipe such as `chat`.
        overrides: `key.sub=value` strings; the value is a YAML scalar, list or mapping. Items of
            a list are addressed by number or name (`data.train.0.weight=2`).

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown, a value has the wrong
            type, or values contradict each other.
    """
    path = find_recipe(path_or_name)
    tree = read_yaml(path)
    if is_build(tree):
        raise RecipeError(
            f"{path}: describes a data build; `cogvlm-sft data build {path_or_name}` makes it, and "
            "a training recipe names the build under data.train"
        )
    for override in overrides:
        apply_override(tree, override)
    return recipe_from_dict(tree, source=str(path), overridden=list(overrides))


def recipe_from_dict(
    tree: Mapping[str, Any], source: str = "recipe", overridden: Iterable[str] = ()
) -> Recipe:
    """Check a recipe given as nested mappings (what a YAML file holds)."""
    try:
        recipe = Recipe.model_validate(dict(tree))
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, source, overridden)) from None
    recipe._source = source
    check_together(recipe)
    return recipe
