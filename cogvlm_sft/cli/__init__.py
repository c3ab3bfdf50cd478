"""The command line: parse, call one library function, print.

Every import of weight stands inside its command, so `--help` answers at once. A mistake of the
user's is one line on stderr and exit status 2; an interrupted run exits with 130 (Ctrl-C) or with
what the trainer says of a signal. The recipe is the interface: flags are few on purpose. Each group
of commands is a module of this folder, its parsers beside what they call.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from cogvlm_sft.cli import checkpoint, data, model, recipe
from cogvlm_sft.cli.arguments import Command
from cogvlm_sft.errors import CogVLMSFTError, RecipeError
from cogvlm_sft.launch import local_rank

_STANDS_ON = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the return value is the exit status."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # On import it warns of an optional package that only speeds up 4-bit products on some CPUs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    overrides = [one for one in rest if "=" in one and not one.startswith("-")]
    # argparse gives a command's settings to it only where they follow each other.
    if hasattr(parsed, "overrides") and len(overrides) == len(rest):
        parsed.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if parsed.version:
        print(_versions())
        return 0
    if parsed.command is None:
        parser.print_help(sys.stderr)
        return 2
    command: Command = parsed.command
    try:
        return command(parsed)
    except CogVLMSFTError as error:
        # All processes of a run read the same recipe: a machine says once what is wrong with it.
        if local_rank() == 0 or not isinstance(error, RecipeError):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`); say nothing more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cogvlm-sft",
        description="Supervised fine-tuning of CogVLM.",
        epilog="example: cogvlm-sft train recipes/chat.yaml train.output=runs/chat",
    )
    parser.set_defaults(command=None)
    parser.add_argument("--version", action="store_true", help="of this and of what it stands on")
    commands = parser.add_subparsers(metavar="COMMAND")
    for group in (model, checkpoint, data, recipe):
        group.add_parsers(commands)
    return parser


def _versions() -> str:
    """What a report of a defect should name, a package a line."""
    from importlib.metadata import version

    return "\n".join(f"{name} {version(name)}" for name in ("cogvlm-sft", *_STANDS_ON))
