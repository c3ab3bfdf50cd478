"""`cogvlm-sft data`: sources, build, verify, export, preview."""

import argparse
from pathlib import Path

from cogvlm_sft.cli.arguments import add_command, positive, recipe_arguments


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands of `data`."""
    data = commands.add_parser(
        "data",
        help="build, check and look at conversations",
        epilog="example: cogvlm-sft data build recipes/data/chat_500k.yaml",
    )
    kinds = data.add_subparsers(required=True, metavar="COMMAND")

    sources = add_command(
        kinds,
        "sources",
        _data_sources,
        "the data sets, and which files to fetch",
        "cogvlm-sft data sources llava_instruct --root data",
    )
    sources.add_argument("names", nargs="*", metavar="NAME", help="of the data sets; default all")
    sources.add_argument(
        "--root",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where your files lie, default data",
    )

    build = add_command(
        kinds,
        "build",
        _data_build,
        "build conversations by a recipe",
        "cogvlm-sft data build recipes/data/chat_500k.yaml out=data/chat",
    )
    recipe_arguments(build)
    build.add_argument(
        "--engine", choices=("local", "ray"), help="where records and pictures are worked on"
    )

    verify = add_command(
        kinds,
        "verify",
        _data_verify,
        "check a build's hashes, counts and images",
        "cogvlm-sft data verify data/chat --images data/images",
    )
    verify.add_argument("build", type=Path)
    verify.add_argument(
        "--images", type=Path, metavar="DIR", help="image root, where it is not the manifest's"
    )

    export = add_command(
        kinds,
        "export",
        _data_export,
        "write a build for another trainer",
        "cogvlm-sft data export data/chat --to trl --out data/chat_trl --images data/i",
    )
    export.add_argument("build", type=Path)
    export.add_argument(
        "--to",
        required=True,
        choices=("trl", "llama-factory", "ms-swift", "llava", "webdataset"),
    )
    export.add_argument("--out", type=Path, required=True, metavar="DIR")
    export.add_argument("--images", type=Path, required=True, metavar="DIR", help="image root")

    preview = add_command(
        kinds,
        "preview",
        _data_preview,
        "exact tokens, positions and loss mask of conversations",
        "cogvlm-sft data preview data/chat --checkpoint runs/demo/chat --limit 2",
    )
    preview.add_argument("build", type=Path)
    settings = preview.add_mutually_exclusive_group(required=True)
    settings.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="folder whose tokenizer and picture size are used",
    )
    settings.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="training recipe whose tokenizer, picture size, length and loss are used",
    )
    preview.add_argument(
        "--images", type=Path, metavar="DIR", help="image root, where it is not the build's"
    )
    preview.add_argument(
        "--html", type=Path, metavar="FILE", help="also write a page with the pictures"
    )
    preview.add_argument("--id", action="append", metavar="ID", help="which conversation; repeats")
    preview.add_argument("--limit", type=positive, default=1, metavar="N", help="default 1")


def _data_sources(arguments: argparse.Namespace) -> int:
    from data_builders.catalogue import list_sources

    print(list_sources(arguments.root, arguments.names))
    return 0


def _data_build(arguments: argparse.Namespace) -> int:
    from data_builders.build import build

    engine = [f"engine={arguments.engine}"] if arguments.engine else []
    result = build(arguments.recipe, [*arguments.overrides, *engine])
    print(result.summary())
    return 0


def _data_verify(arguments: argparse.Namespace) -> int:
    from data_builders.manifest import verify

    report = verify(arguments.build, arguments.images)
    print(report.summary())
    return 0 if report.ok else 1


def _data_export(arguments: argparse.Namespace) -> int:
    from data_builders.export import export

    count = export(arguments.build, arguments.to, arguments.out, arguments.images)
    plural = "s" * (count != 1)
    print(f"{count:,} conversation{plural} written to {arguments.out} for {arguments.to}")
    return 0


def _data_preview(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.data.preview import encode_chosen, render_text

    if arguments.recipe:
        from cogvlm_sft.recipe import load_recipe
        from cogvlm_sft.training.preflight import processor_for

        recipe = load_recipe(arguments.recipe)
        data, processor = recipe.data, processor_for(recipe)
        images, length, loss_on = data.image_root, data.max_length, data.loss_on
    else:
        from cogvlm_sft.checkpoint.load import load_processor

        processor = load_processor(arguments.checkpoint)
        images, length, loss_on = None, None, "all"
    images = arguments.images or images or _image_root_of(arguments.build)
    previewed = encode_chosen(
        arguments.build,
        processor,
        ids=arguments.id,
        limit=arguments.limit,
        max_length=length,
        loss_on=loss_on,
    )
    if arguments.html:  # first, since the reader of the tables may go away (`| head`)
        from cogvlm_sft.data.preview_page import render_page

        page = render_page(previewed, processor, images or Path())
        arguments.html.write_text(page, encoding="utf-8")
    print(render_text(previewed, processor, images))
    return 0


def _image_root_of(build: Path) -> Path | None:
    """The image root that a build folder's manifest names; None for a plain file."""
    from data_builders.manifest import read_manifest

    has_manifest = (build / "manifest.json").is_file()
    return Path(read_manifest(build)["image_root"]) if has_manifest else None
