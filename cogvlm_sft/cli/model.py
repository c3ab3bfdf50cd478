"""`cogvlm-sft train`, `estimate`, `evaluate` and `chat`: what is done with a model."""

import argparse
import json
from pathlib import Path

from cogvlm_sft.cli.arguments import (
    add_command,
    positive,
    quantize_argument,
    recipe_arguments,
)


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The four commands."""
    train = add_command(
        commands,
        "train",
        _train,
        "train by a recipe",
        "cogvlm-sft train recipes/chat.yaml train.iterations=100",
    )
    recipe_arguments(train)
    train.add_argument("--print", action="store_true", help="print the resolved recipe and stop")

    estimate = add_command(
        commands,
        "estimate",
        _estimate,
        "memory that a recipe needs by part, what fits, operations and GPU-hours",
        "cogvlm-sft estimate chat --gpus 8 --gpu-memory 80",
    )
    recipe_arguments(estimate)
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

    evaluate = add_command(
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
    evaluate.add_argument("--limit", type=positive, metavar="N", help="only the first N questions")
    evaluate.add_argument("--batch-size", type=positive, default=16, metavar="N", help="default 16")
    evaluate.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="where the checkpoint holds none"
    )
    quantize_argument(evaluate)
    evaluate.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="predictions and reports; CHECKPOINT/evaluation/NAME by default",
    )

    chat = add_command(
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
        "--max-new-tokens", type=positive, default=256, metavar="N", help="default 256"
    )
    chat.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="where the checkpoint holds none"
    )
    quantize_argument(chat)
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
        "--port", type=positive, metavar="N", help="default 7860 with --web, 8000 with --serve"
    )


def _train(arguments: argparse.Namespace) -> int:
    from cogvlm_sft.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.print:
        print(recipe.to_yaml(), end="")
        return 0
    from cogvlm_sft.launch import rank
    from cogvlm_sft.training.run import train

    result = train(recipe)
    if rank() == 0:
        print(f"checkpoint: {result.output}")
    if recipe.evaluate is not None and recipe.evaluate.tasks:
        from cogvlm_sft.evaluation.run import evaluate_tasks

        evaluated = evaluate_tasks(
            result.output,
            recipe.evaluate.tasks,
            batch_size=recipe.evaluate.batch_size,
            # What was trained in 4 bits may fit this machine in no other way.
            quantize=recipe.model.quantize.type if recipe.model.quantize else None,
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
        quantize=arguments.quantize,
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
            quantize=arguments.quantize,
        )
        return 0
    if arguments.serve:
        from cogvlm_sft.chat.serve import serve

        serve(
            arguments.checkpoint,
            host=arguments.host,
            port=arguments.port or 8000,
            tokenizer=arguments.tokenizer,
            quantize=arguments.quantize,
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
            quantize=arguments.quantize,
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
        quantize=arguments.quantize,
        draw=arguments.draw,
    )
    print(json.dumps(record, ensure_ascii=False) if arguments.json else record["answer"])
    return 0
