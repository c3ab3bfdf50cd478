"""The command line: parse, call one library function, print.

Every import of weight stands inside its command, so `--help` answers at once. A mistake of the
user's is one line on stderr and exit status 2; an interrupted run exits with 130 (Ctrl-C) or with
what the trainer says of a signal. The recipe is the interface: flags are few on purpose.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cogvlm_sft.errors import CogVLMSFTError

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the return value is the exit status."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # On import it warns of an optional package that only speeds up 4-bit products on some CPUs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    parser = _parser()
    parsed = parser.parse_args(arguments)
    command: Command = parsed.command
    try:
        return command(parsed)
    except CogVLMSFTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`); say nothing more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _train(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.print:
        print(recipe.to_yaml(), end="")
        return 0
    from cogvlm_sft.training.run import train

    result = train(recipe)
    print(f"checkpoint: {result.output}")
    if recipe.evaluate is not None and recipe.evaluate.tasks:
        from cogvlm_sft.evaluation.run import evaluate_tasks

        evaluated = evaluate_tasks(
            result.output, recipe.evaluate.tasks, batch_size=recipe.evaluate.batch_size
        )
        if evaluated is not None:
            print(f"evaluation: {evaluated}")
    return 0


def _estimate(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.recipe import load_recipe
    from cogvlm_sft.training.estimate import estimate

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    found = estimate(
        recipe,
        gpus=arguments.gpus,
        gpu_memory_gib=arguments.gpu_memory,
        nodes=arguments.nodes,
        mfu=arguments.mfu,
        peak_tflops=arguments.peak_tflops,
    )
    print(found.table())
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.evaluation.run import evaluate_checkpoint

    report = evaluate_checkpoint(
        arguments.checkpoint,
        arguments.task,
        arguments.annotations,
        arguments.images,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        output=arguments.output,
        tokenizer=arguments.tokenizer,
    )
    if report:  # the first process alone has one
        print(json.dumps(report, indent=2, ensure_ascii=False))
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    if arguments.web:
        from cogvlm_sft.chat.web import open_page

        open_page(
            arguments.checkpoint,
            compare=arguments.compare,
            host=arguments.host,
            port=arguments.port or 7860,
            tokenizer=arguments.tokenizer,
        )
        return 0
    if arguments.serve:
        from cogvlm_sft.chat.serve import serve

        serve(
            arguments.checkpoint,
            host=arguments.host,
            port=arguments.port or 8000,
            tokenizer=arguments.tokenizer,
        )
        return 0
    from cogvlm_sft.chat.session import Decoding
    from cogvlm_sft.chat.terminal import ask, chat_loop

    decoding = Decoding(max_new_tokens=arguments.max_new_tokens)
    if arguments.question is None:
        chat_loop(
            arguments.checkpoint,
            image=arguments.image,
            style=arguments.style,
            decoding=decoding,
            tokenizer=arguments.tokenizer,
            as_json=arguments.json,
        )
        return 0
    record = ask(
        arguments.checkpoint,
        arguments.image,
        arguments.question,
        style=arguments.style,
        decoding=decoding,
        tokenizer=arguments.tokenizer,
        draw=arguments.draw,
    )
    print(json.dumps(record, ensure_ascii=False) if arguments.json else record["answer"])
    return 0


def _checkpoint_inspect(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.checkpoint.inspect import inspect_checkpoint

    found = inspect_checkpoint(arguments.checkpoint)
    print(found.table())
    return 1 if found.problems else 0


def _checkpoint_compose(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.checkpoint.compose import compose, config_fields

    out = compose(
        arguments.language_model,
        arguments.vision_tower,
        arguments.out,
        config=config_fields(arguments.fields),
        tokenizer=arguments.tokenizer,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    print(f"checkpoint: {out}")
    return 0


def _checkpoint_convert(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.checkpoint.sat import convert_sat

    out = convert_sat(
        arguments.sat,
        arguments.out,
        tokenizer=arguments.tokenizer,
        template=arguments.template,
        dtype=arguments.dtype,
        lora_alpha=arguments.lora_alpha,
    )
    print(f"checkpoint: {out}")
    return 0


def _data_sources(arguments: argparse.Namespace) -> int:
    from data_builders.catalogue import list_sources

    print(list_sources(arguments.root))
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
    print(f"{count} conversations written to {arguments.out} for {arguments.to}")
    return 0


def _data_preview(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.data.preview import encode_chosen, render_text

    if arguments.recipe:
        from cogvlm_sft.recipe import load_recipe
        from cogvlm_sft.training.preflight import processor_for

        data = load_recipe(arguments.recipe).data
        processor = processor_for(load_recipe(arguments.recipe))
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


def _checkpoint_export(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.checkpoint.export import export_checkpoint, push_checkpoint

    out = export_checkpoint(
        arguments.checkpoint, arguments.out, tokenizer=arguments.tokenizer, dtype=arguments.dtype
    )
    print(f"checkpoint: {out}")
    if arguments.push_to_hub is not None:
        address = push_checkpoint(out, arguments.push_to_hub, public=arguments.public)
        print(f"uploaded: {address}")
    return 0


def _checkpoint_merge(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.checkpoint.merge import merge

    print(merge(arguments.adapter, arguments.out, base=arguments.base).summary())
    return 0


def _recipe_list(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.recipe_files import list_recipes

    for name, title in list_recipes():
        print(f"{name:24} {title}")
    return 0


def _recipe_show(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.recipe_files import find_recipe

    print(find_recipe(arguments.recipe).read_text(encoding="utf-8"), end="")
    return 0


def _recipe_copy(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.recipe_files import copy_recipe

    print(f"copied to {copy_recipe(arguments.recipe, arguments.destination)}")
    return 0


def _recipe_check(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.recipe import load_recipe

    load_recipe(arguments.recipe, arguments.overrides)
    print(f"{arguments.recipe}: every key is known and every value fits")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cogvlm-sft",
        description="Supervised fine-tuning of CogVLM.",
        epilog="example: cogvlm-sft train recipes/chat.yaml train.output=runs/chat",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = _add(
        commands,
        "train",
        _train,
        "train by a recipe",
        "cogvlm-sft train recipes/chat.yaml train.iterations=100",
    )
    _recipe_arguments(train)
    train.add_argument("--print", action="store_true", help="print the resolved recipe and stop")

    estimate = _add(
        commands,
        "estimate",
        _estimate,
        "memory that a recipe needs by part, what fits, operations and GPU-hours",
        "cogvlm-sft estimate chat --gpus 8 --gpu-memory 80",
    )
    _recipe_arguments(estimate)
    estimate.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="of one machine, default 1"
    )
    estimate.add_argument("--nodes", type=int, default=1, metavar="M", help="machines, default 1")
    estimate.add_argument(
        "--gpu-memory",
        type=float,
        default=80.0,
        metavar="GIB",
        help="memory of one GPU in GiB, default 80",
    )
    estimate.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="share of the peak that the hours assume, default 0.4",
    )
    estimate.add_argument(
        "--peak-tflops",
        type=float,
        default=989.0,
        metavar="T",
        help="dense bf16 peak of one GPU, default 989 (H100 SXM)",
    )

    evaluate = _add(
        commands,
        "evaluate",
        _evaluate,
        "score a checkpoint on a benchmark or on held-out conversations",
        "cogvlm-sft evaluate runs/demo/chat --task exact_match "
        "--annotations runs/demo/data/heldout_digits --images runs/demo/images",
    )
    evaluate.add_argument("checkpoint", type=Path)
    evaluate.add_argument(
        "--task", required=True, metavar="NAME", help="docs/evaluation.md lists them; vqav2, nocaps"
    )
    evaluate.add_argument(
        "--annotations",
        type=Path,
        required=True,
        nargs="+",
        metavar="FILE",
        help="the task's official files; a build folder for exact_match and box_iou",
    )
    evaluate.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures")
    evaluate.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    evaluate.add_argument("--batch-size", type=int, default=16, metavar="N", help="default 16")
    evaluate.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="where the checkpoint holds none"
    )
    evaluate.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="predictions and reports; CHECKPOINT/evaluation/NAME by default",
    )

    chat = _add(
        commands,
        "chat",
        _chat,
        "talk to a checkpoint, or ask it one question",
        'cogvlm-sft chat runs/demo/chat --image digit.png --question "What digit is this?"',
    )
    chat.add_argument("checkpoint", type=Path)
    chat.add_argument("--image", type=Path, metavar="PICTURE")
    chat.add_argument("--question", help="ask once, print the answer, and stop")
    chat.add_argument(
        "--style",
        choices=("chat", "vqa", "base", "text"),
        help="prompt template; the checkpoint's own by default",
    )
    chat.add_argument("--json", action="store_true", help="print each answer as a JSON object")
    chat.add_argument(
        "--draw",
        type=Path,
        metavar="FILE",
        help="with --question: write the picture with the answer's boxes",
    )
    chat.add_argument(
        "--max-new-tokens", type=_positive, default=256, metavar="N", help="default 256"
    )
    chat.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="where the checkpoint holds none"
    )
    place = chat.add_mutually_exclusive_group()
    place.add_argument("--web", action="store_true", help="a page in the browser")
    place.add_argument("--serve", action="store_true", help="an OpenAI-compatible server")
    chat.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="with --web: further checkpoints beside the run's base and snapshots",
    )
    chat.add_argument(
        "--host", default="127.0.0.1", help="with --web or --serve; this machine alone by default"
    )
    chat.add_argument(
        "--port", type=_positive, metavar="N", help="default 7860 with --web, 8000 with --serve"
    )

    _add_checkpoint(commands)
    _add_data(commands)
    _add_recipe(commands)
    return parser


def _add_checkpoint(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    checkpoint = commands.add_parser(
        "checkpoint",
        help="compose, convert and merge checkpoints",
        epilog="example: cogvlm-sft checkpoint compose --language-model checkpoints/vicuna-7b-v1.5 "
        "--vision-tower checkpoints/eva02-clip-e --out checkpoints/base",
    )
    kinds = checkpoint.add_subparsers(required=True, metavar="COMMAND")

    inspect = _add(
        kinds,
        "inspect",
        _checkpoint_inspect,
        "what a checkpoint is and what is missing, from its headers; status 1 where something is",
        "cogvlm-sft checkpoint inspect checkpoints/cogvlm-chat-hf",
    )
    inspect.add_argument("checkpoint", type=Path, help="any checkpoint folder, or a SAT file")

    compose = _add(
        kinds,
        "compose",
        _checkpoint_compose,
        "a base model from a Llama and a vision tower; the visual expert is the Llama's copy",
        "cogvlm-sft checkpoint compose --language-model checkpoints/vicuna-7b-v1.5 "
        "--vision-tower checkpoints/eva02-clip-e --out checkpoints/base",
    )
    compose.add_argument(
        "--language-model",
        type=Path,
        required=True,
        metavar="DIR|GGUF",
        help="Hugging Face folder of a Llama, or a .gguf file",
    )
    compose.add_argument(
        "--vision-tower",
        required=True,
        metavar="DIR|random",
        help="EVA2-CLIP-E (timm, open_clip or Hugging Face names), a CogVLM, or random",
    )
    compose.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    compose.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="in place of the language model's own"
    )
    compose.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights on the disk; the language model's by default",
    )
    compose.add_argument("--seed", type=int, default=0, metavar="N", help="of fresh parts")
    compose.add_argument(
        "fields",
        nargs="*",
        metavar="key=value",
        help="fields of config.json to set, such as vision_config.image_size=224",
    )

    merge = _add(
        kinds,
        "merge",
        _checkpoint_merge,
        "add an adapter to its base's weights and check the result",
        "cogvlm-sft checkpoint merge runs/chat_qlora --out checkpoints/mine",
    )
    merge.add_argument("adapter", type=Path, help="folder of a run, a snapshot or a PEFT adapter")
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    merge.add_argument(
        "--base", type=Path, metavar="DIR", help="whole checkpoint; default: what the adapter names"
    )

    convert = _add(
        kinds,
        "convert",
        _checkpoint_convert,
        "a SAT checkpoint (mp_rank_NN_model_states.pt) to the released layout",
        "cogvlm-sft checkpoint convert checkpoints/cogvlm-chat-sat --out checkpoints/cogvlm-chat "
        "--tokenizer checkpoints/vicuna-7b-v1.5",
    )
    convert.add_argument("sat", type=Path, metavar="SAT_DIR", help="the checkpoint, or one step")
    convert.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    convert.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="tokenizer to put beside the weights"
    )
    convert.add_argument(
        "--template",
        choices=("chat", "base", "vqa"),
        default="chat",
        help="prompt style the weights were trained with, default chat",
    )
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights on the disk; the checkpoint's by default",
    )
    convert.add_argument(
        "--lora-alpha", type=float, default=1.0, metavar="A", help="of LoRA matrices, default 1"
    )

    export = _add(
        kinds,
        "export",
        _checkpoint_export,
        "a folder that transformers and the engines load without cogvlm-sft",
        "cogvlm-sft checkpoint export runs/chat --out exports/chat --dtype bfloat16",
    )
    export.add_argument("checkpoint", type=Path, metavar="RUN", help="a run's folder, or any other")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    export.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="where the checkpoint holds none"
    )
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights on the disk; the checkpoint's by default",
    )
    export.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="upload the export; nothing is by default"
    )
    export.add_argument(
        "--public", action="store_true", help="with --push-to-hub: a repository everyone can see"
    )


def _add_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    data = commands.add_parser(
        "data",
        help="build, check and look at conversations",
        epilog="example: cogvlm-sft data build recipes/data/chat_500k.yaml",
    )
    kinds = data.add_subparsers(required=True, metavar="COMMAND")

    sources = _add(
        kinds,
        "sources",
        _data_sources,
        "the data sets, and which files to fetch",
        "cogvlm-sft data sources --root data",
    )
    sources.add_argument(
        "--root",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where your files lie, default data",
    )

    build = _add(
        kinds,
        "build",
        _data_build,
        "build conversations by a recipe",
        "cogvlm-sft data build recipes/data/chat_500k.yaml out=data/chat",
    )
    _recipe_arguments(build)
    build.add_argument(
        "--engine", choices=("local", "ray"), help="where records and pictures are worked on"
    )

    verify = _add(
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

    export = _add(
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

    preview = _add(
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
    preview.add_argument("--limit", type=int, default=1, metavar="N", help="default 1")


def _add_recipe(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    recipe = commands.add_parser(
        "recipe",
        help="list, show, copy and check recipes",
        epilog="example: cogvlm-sft recipe copy chat my_chat.yaml",
    )
    kinds = recipe.add_subparsers(required=True, metavar="COMMAND")
    _add(kinds, "list", _recipe_list, "the packaged recipes", "cogvlm-sft recipe list")
    show = _add(kinds, "show", _recipe_show, "print a recipe", "cogvlm-sft recipe show chat")
    show.add_argument("recipe")
    copy = _add(
        kinds,
        "copy",
        _recipe_copy,
        "copy a packaged recipe to edit it",
        "cogvlm-sft recipe copy chat my_chat.yaml",
    )
    copy.add_argument("recipe")
    copy.add_argument("destination", type=Path)
    check = _add(
        kinds,
        "check",
        _recipe_check,
        "check every key and value",
        "cogvlm-sft recipe check my_chat.yaml",
    )
    _recipe_arguments(check)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    command: Command,
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a path, or the name of a packaged recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that replace the recipe's"
    )


if __name__ == "__main__":
    sys.exit(main())
