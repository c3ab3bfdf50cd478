"""`cogvlm-sft checkpoint`: inspect, compose, merge, convert, export."""

import argparse
from pathlib import Path

from cogvlm_sft.cli.arguments import add_command


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands of `checkpoint`."""
    checkpoint = commands.add_parser(
        "checkpoint",
        help="compose, convert and merge checkpoints",
        epilog="example: cogvlm-sft checkpoint compose --language-model checkpoints/vicuna-7b-v1.5 "
        "--vision-tower checkpoints/eva02-clip-e --out checkpoints/base",
    )
    kinds = checkpoint.add_subparsers(required=True, metavar="COMMAND")

    inspect = add_command(
        kinds,
        "inspect",
        _checkpoint_inspect,
        "what a checkpoint is and what is missing, from its headers; status 1 where something is",
        "cogvlm-sft checkpoint inspect checkpoints/cogvlm-chat-hf",
    )
    inspect.add_argument("checkpoint", type=Path, help="any checkpoint folder, or a SAT file")

    compose = add_command(
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

    merge = add_command(
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

    convert = add_command(
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

    export = add_command(
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


def _checkpoint_merge(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.checkpoint.merge import merge

    print(merge(arguments.adapter, arguments.out, base=arguments.base).summary())
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
