"""`cogvlm-sft recipe`: list, show, copy, check, keys."""

import argparse
from pathlib import Path

from cogvlm_sft.cli.arguments import add_command, recipe_arguments


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands of `recipe`."""
    recipe = commands.add_parser(
        "recipe",
        help="list, show, copy and check recipes",
        epilog="example: cogvlm-sft recipe copy chat my_chat.yaml",
    )
    kinds = recipe.add_subparsers(required=True, metavar="COMMAND")
    add_command(kinds, "list", _recipe_list, "the packaged recipes", "cogvlm-sft recipe list")
    show = add_command(kinds, "show", _recipe_show, "print a recipe", "cogvlm-sft recipe show chat")
    show.add_argument("recipe")
    copy = add_command(
        kinds,
        "copy",
        _recipe_copy,
        "copy a packaged recipe to edit it",
        "cogvlm-sft recipe copy chat my_chat.yaml",
    )
    copy.add_argument("recipe")
    copy.add_argument("destination", type=Path)
    check = add_command(
        kinds,
        "check",
        _recipe_check,
        "check every key and value",
        "cogvlm-sft recipe check my_chat.yaml",
    )
    recipe_arguments(check)
    keys = add_command(
        kinds,
        "keys",
        _recipe_keys,
        "every key of a training recipe: values, default, meaning",
        "cogvlm-sft recipe keys train",
    )
    keys.add_argument(
        "prefix", nargs="?", default="", help="only those below, such as tune.adapter"
    )


def _recipe_list(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.recipe.files import list_recipes

    for name, title in list_recipes():
        print(f"{name:24} {title}")
    return 0


def _recipe_show(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.recipe.files import find_recipe

    print(find_recipe(arguments.recipe).read_text(encoding="utf-8"), end="")
    return 0


def _recipe_copy(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.recipe.files import copy_recipe

    print(f"copied to {copy_recipe(arguments.recipe, arguments.destination)}")
    return 0


def _recipe_check(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.recipe.files import find_recipe, is_build, read_yaml

    if is_build(read_yaml(find_recipe(arguments.recipe))):
        from data_builders.recipe import load_recipe as load_build

        load_build(arguments.recipe, arguments.overrides)
    else:
        from cogvlm_sft.recipe import load_recipe

        load_recipe(arguments.recipe, arguments.overrides)
    print(f"{arguments.recipe}: every key is known and every value fits")
    return 0


def _recipe_keys(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.recipe.keys import recipe_keys

    for key in recipe_keys(arguments.prefix):
        print(key)
    return 0
