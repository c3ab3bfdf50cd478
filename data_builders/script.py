"""The command line that every source module has: `python -m data_builders.sources.NAME`.

It makes a build recipe of one source out of its flags and runs it; the source's own options become
flags by themselves. Mistakes of the user end in one line and status 2.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from cogvlm_sft.errors import CogVLMSFTError, RecipeError
from data_builders.build import build_recipe
from data_builders.recipe import parse_recipe
from data_builders.source import load_source


def run_source(name: str, arguments: Sequence[str] | None = None) -> None:
    """The command line of one source; exits with status 2 on a mistake of the user's."""
    source = load_source(name)
    module = sys.modules[source.__module__]
    parser = argparse.ArgumentParser(
        prog=f"python -m data_builders.sources.{name}",
        description=f"{module.__doc__}\n{source.what_to_fetch()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--annotations",
        nargs="+",
        default=[],
        metavar="PATH",
        help="the released files, or zip or tar files that hold them",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders that hold the pictures, however deep, or zip or tar files of them",
    )
    parser.add_argument("--out", required=True, metavar="BUILD", help="the build folder to write")
    parser.add_argument(
        "--image-root",
        metavar="DIR",
        help="what picture paths are relative to; the image folders' parent unless given",
    )
    parser.add_argument(
        "--style",
        choices=("chat", "vqa", "base"),
        help=f"prompt style, {source.style} unless given",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the order")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes; the result does not depend on it",
    )
    parser.add_argument("--max", type=int, metavar="N", help="at most N conversations")
    parser.add_argument("--shard-size", type=int, default=50_000, help="conversations a file")
    parser.add_argument("--min-side", type=int, default=28, help="smallest picture side, pixels")
    parser.add_argument("--no-image-check", action="store_true", help="do not open pictures")
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="PATH",
        help="lists of held-out picture ids, or folders of held-out pictures; theirs are dropped",
    )
    parser.add_argument(
        "--near",
        type=int,
        metavar="BITS",
        help="also drop the same words about pictures whose hashes differ in so few bits: 4",
    )
    parser.add_argument("--keep-duplicates", action="store_true", help="keep what is in already")
    for key, option in source.Options.model_fields.items():
        if key == "clean":
            parser.add_argument(
                "--no-clean",
                dest="option_clean",
                action="store_const",
                const=False,
                help="without the set's own rules: keep what `clean` drops or rewrites",
            )
            continue
        described = str(option.annotation)
        parser.add_argument(
            f"--{key.replace('_', '-')}",
            dest=f"option_{key}",
            nargs="+" if "dict" in described or "list" in described else None,
            action="extend" if "dict" in described or "list" in described else "store",
            metavar="OURS=THEIRS" if "dict" in described else "VALUE",
            help=_meaning(source.Options, key),
        )
    given = parser.parse_args(arguments)
    entry: dict[str, Any] = {
        "source": name, "annotations": given.annotations, "images": given.images,
    }  # fmt: skip
    if given.style:
        entry["style"] = given.style
    if given.max is not None:
        entry["max"] = given.max
    try:
        for key in source.Options.model_fields:
            value = getattr(given, f"option_{key}")
            if value is not None:
                entry[key] = _pairs(value) if key == "columns" else value
        content = {
            "out": given.out, "seed": given.seed, "workers": given.workers,
            "shard_size": given.shard_size, "image_root": given.image_root,
            "images": {"check": not given.no_image_check, "min_side": given.min_side},
            "deduplicate": {"text": not given.keep_duplicates, "near": given.near},
            "sources": [entry],
            "decontaminate": {"against": given.against},
        }  # fmt: skip
        print(build_recipe(parse_recipe(content, "command line")).summary())
    except CogVLMSFTError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of our output went away (`| head`); say nothing more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _meaning(options: type[BaseModel], key: str) -> str:
    """What the docstring of an options class, or of one it extends, says of an attribute."""
    for model in options.__mro__:
        said = re.search(rf"^ +{key}: (.+?)(?=^ +\w+: |^ *$|\Z)", model.__doc__ or "", re.M | re.S)
        if said:
            return " ".join(said[1].split()).rstrip(".")
    return ""  # docstrings are off


def _pairs(items: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in items:
        ours, equals, theirs = item.partition("=")
        if not equals or not theirs:
            raise RecipeError(f"--columns {item}: expected OURS=THEIRS, such as question=ask")
        pairs[ours] = theirs
    return pairs
