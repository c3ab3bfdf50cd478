"""The demo from raw annotation files to a model that answers, with its scores.

    python -m cogvlm_sft.demo.run

Every stage is the real command in a process of its own: `cogvlm-sft data build`, `cogvlm-sft train`
on the two recipes of `recipes/demo/`, and then the evaluation on held-out pictures before and after
alignment. Notable choices: the run begins in an empty folder, so that nothing of an earlier one is
counted; the held-out pictures are asked once, at the end; `--split validation` scores the split
that settings were chosen on instead. It ends with a table, three answers, `report.json`, and two
pictures: `loss.png` and `answers.png`.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cogvlm_sft.demo.corpus import DEFAULT_SIZES, Example, Sizes, make_corpus
from cogvlm_sft.demo.figures import draw_answers, draw_curves
from cogvlm_sft.demo.tokenizer import train_tokenizer
from cogvlm_sft.errors import CogVLMSFTError, DataError
from cogvlm_sft.model.prompts import PROMPTS

# Where the recipes of recipes/demo read and write.
HOME = Path("runs/demo")
# Demo task: how it is judged, the source that reads its file, the file's ending.
TASKS = {
    "digits": ("exact_match", "llava_instruct", "json"),
    "reading": ("exact_match", "custom_vqa", "csv"),
    "boxes": ("box_iou", "custom_vqa", "jsonl"),
    "photos": ("exact_match", "llava_instruct", "json"),
}
_STYLES = {"digits": "chat", "photos": "chat", "reading": "vqa", "boxes": "vqa"}


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; 0 when all stages succeeded."""
    return command_line("cogvlm_sft.demo.run", __doc__, run, arguments)


def command_line(
    module: str, description: str | None, run: Callable[[str], object], arguments: list[str] | None
) -> int:
    """Parses `--split` and runs a demo; its mistakes are one line each.

    Args:
        module: For the help.
        description: For the help.
        run: The demo, given the split to score.
        arguments: Of the command line; None takes the process's.

    Returns:
        The exit status: 0, 2 for a mistake that was named, or that of the stage that failed.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--split",
        choices=("heldout", "validation"),
        default="heldout",
        help="pictures that are scored; settings are chosen on `validation` only",
    )
    parsed = parser.parse_args(arguments)
    try:
        run(parsed.split)
    except CogVLMSFTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: the stage above ended with status {error.returncode}", file=sys.stderr)
        return error.returncode if error.returncode > 0 else 1
    return 0


def run(split: str = "heldout", sizes: Sizes = DEFAULT_SIZES) -> dict[str, Any]:
    """All stages, in the working directory.

    Args:
        split: `heldout` or `validation`.
        sizes: How many training pictures are made.

    Returns:
        What is written to `runs/demo/report.json`.

    Raises:
        DataError: A package whose pictures are needed is missing, or this is not the repository.
        subprocess.CalledProcessError: A stage failed; it has printed why.
    """
    recipes = Path("recipes/demo")
    if not (recipes / "pretrain.yaml").is_file():
        raise DataError(
            f"{recipes / 'pretrain.yaml'} is not below {Path.cwd()}; "
            "run the demo in the root of the repository"
        )
    # In a model of this size threads wait for each other longer than they compute: on two cores a
    # step takes 108 ms with one thread, 130 with two, 172 with two that sleep while they wait.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    seconds: dict[str, float] = {}
    if HOME.exists():
        shutil.rmtree(HOME)

    _say("1/4", "pictures, raw annotation files, tokenizer, conversations")
    clock = time.monotonic()
    examples = make_corpus(HOME, sizes)
    train_tokenizer(training_texts(examples), HOME / "tokenizer")
    run_command("data", "build", str(recipes / "pretrain_data.yaml"))
    run_command("data", "build", str(recipes / "data.yaml"))
    for task, (_, source, ending) in TASKS.items():
        run_command(
            "data",
            "build",
            str(recipes / "heldout.yaml"),
            f"out={HOME}/data/{split}_{task}",
            f"sources.0.name={task}",
            f"sources.0.source={source}",
            f"sources.0.annotations={HOME}/raw/{split}_{task}.{ending}",
        )
    write_plain_text(examples, split, HOME / "raw" / f"{split}_text.jsonl")
    seconds["build"] = time.monotonic() - clock

    for number, stage in (("2/4", "pretrain"), ("3/4", "chat")):
        _say(number, f"cogvlm-sft train {recipes / stage}.yaml")
        clock = time.monotonic()
        run_command("train", str(recipes / f"{stage}.yaml"))
        seconds[stage] = time.monotonic() - clock

    _say("4/4", f"{split} pictures, before and after alignment")
    clock = time.monotonic()
    (before, text_before), (after, text_after) = (
        _score(HOME / stage, split) for stage in ("pretrain", "chat")
    )
    seconds["evaluate"] = time.monotonic() - clock
    seconds["total"] = time.monotonic() - started

    report = {
        "split": split,
        "tasks": {task: _figures(result) for task, result in after.items()},
        "before_alignment": {task: _figures(result) for task, result in before.items()},
        "text_perplexity": {"pretrained": text_before, "aligned": text_after},
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "peak_memory_gib": round(peak_memory_gib(), 3),
    }
    text = json.dumps(report, indent=2) + "\n"
    (HOME / "report.json").write_text(text, encoding="utf-8")
    print(table(report))
    print(_samples(after))
    curve, answers = draw_curves(HOME), draw_answers(HOME, after)
    print(f"checkpoint {HOME}/chat, report {HOME}/report.json, loss curve {curve}, {answers}")
    return report


def training_texts(examples: list[Example]) -> list[str]:
    """Prompts and answers of the training split, for the tokenizer."""
    texts: list[str] = []
    for example in examples:
        if example.split != "train":
            continue
        _, before, after = PROMPTS[_STYLES[example.task]]
        for question, answer in example.base:
            texts.append(f"{question} {answer}")
        for question, answer in example.rounds:
            texts.append(f"{before}{question}{after} {answer}")
    return texts


def write_plain_text(examples: list[Example], split: str, path: Path) -> None:
    """The pretraining stage's phrases and answers of one split, read without their pictures.

    They tell whether alignment unlearned what the language layers knew before it.
    """
    pairs = {pair for example in examples if example.split == split for pair in example.base}
    rows = [json.dumps({"prompt": p, "text": text}) + "\n" for p, text in sorted(pairs)]
    path.write_text("".join(rows), encoding="utf-8")


def table(report: dict[str, Any]) -> str:
    """The scores, times and memory as a table."""
    lines = [
        "",
        f"{report['split']:<10} {'questions':>9} {'pretrained':>11} {'aligned':>9}   95 % interval",
    ]
    for task, figures in report["tasks"].items():
        earlier = report["before_alignment"][task]["accuracy"]
        low, high = figures["interval"]
        lines.append(
            f"{task:<10} {figures['count']:>9} {earlier:>11.3f} {figures['accuracy']:>9.3f}"
            f"   {low:.3f} to {high:.3f}  ({figures['metric']})"
        )
    text = report["text_perplexity"]
    lines.append(
        f"{'text':<21}{text['pretrained']['perplexity']:>11.2f} "
        f"{text['aligned']['perplexity']:>9.2f}   perplexity of phrases, no pictures"
    )
    spent = ", ".join(f"{stage} {value:.0f}" for stage, value in report["seconds"].items())
    lines.append(f"seconds: {spent}; peak memory {report['peak_memory_gib']:.2f} GiB")
    return "\n".join(lines)


def _score(checkpoint: Path, split: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Held-out scores and text perplexity of one checkpoint, loaded once."""
    from cogvlm_sft.checkpoint.load import load_model, load_processor
    from cogvlm_sft.evaluation.run import evaluate_model

    model, processor = load_model(checkpoint), load_processor(checkpoint)
    scores = {
        task: evaluate_model(
            model,
            processor,
            judge,
            [HOME / "data" / f"{split}_{task}"],
            HOME / "images",
            batch_size=64,
            output=checkpoint / "evaluation" / f"{split}_{task}",
            checkpoint=checkpoint,
        )
        for task, (judge, _, _) in TASKS.items()
    }
    text = evaluate_model(
        model,
        processor,
        "text_perplexity",
        [HOME / "raw" / f"{split}_text.jsonl"],
        batch_size=64,
        output=checkpoint / "evaluation" / f"{split}_text",
        checkpoint=checkpoint,
    )
    perplexity = text["figures"][0]
    return scores, {
        "perplexity": round(perplexity["value"], 4),
        "interval": [round(bound, 4) for bound in perplexity["interval"]],
        "count": text["count"],
    }


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    accuracy = result["figures"][0]
    return {
        "accuracy": round(accuracy["value"] / 100, 4),
        "count": result["count"],
        "metric": result["metric"],
        "interval": [round(bound / 100, 4) for bound in accuracy["interval"]],
    }


def _samples(results: dict[str, dict[str, Any]]) -> str:
    lines = ["", "three held-out pictures:"]
    for task in ("digits", "reading", "boxes"):
        row = results[task]["samples"][0]
        lines.append(f"  {row['images'][0]}")
        lines.append(f"    {row['question']} -> {row['prediction']}   (true: {row['answer']})")
    return "\n".join(lines)


def run_command(*arguments: str) -> None:
    """Runs `cogvlm-sft` in a process of its own, with this interpreter."""
    subprocess.run([sys.executable, "-m", "cogvlm_sft.cli", *arguments], check=True)


def _say(number: str, text: str) -> None:
    print(f"\n[{number}] {text}", flush=True)


def peak_memory_gib() -> float:
    """The largest resident size that this process or any of its children had.

    `ru_maxrss` is in KiB on Linux and in bytes on macOS.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return peak * unit / 1024**3


if __name__ == "__main__":
    raise SystemExit(main())
