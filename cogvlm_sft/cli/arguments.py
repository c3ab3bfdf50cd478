"""What the parsers of all commands share: a command with its example, recipes, counts."""

import argparse
from collections.abc import Callable

Command = Callable[[argparse.Namespace], int]


def positive(text: str) -> int:
    """A count: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    command: Command,
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    """A parser of one command, whose help ends with the example."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    return parser


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe and the settings that replace its own."""
    parser.add_argument("recipe", help="a path, or the name of a packaged recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that replace the recipe's"
    )


def quantize_argument(parser: argparse.ArgumentParser) -> None:
    """4-bit weights, for a checkpoint that is larger than the card."""
    parser.add_argument(
        "--quantize",
        choices=("nf4",),
        help="hold language model and visual expert in 4 bits: 16 GB for a 17B model, not 35",
    )
