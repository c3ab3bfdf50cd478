"""What a run was made of, written at its start and shown at its end.

`run.json` holds the versions, the digests of the data and the parameter groups. A resumed run
compares the digests: other data in the same folder would silently change the order of everything.
The run card is the `README.md` of the finished checkpoint, ready for the Hub.
"""

import hashlib
import json
import platform
import secrets
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cogvlm_sft.checkpoint.staging import write_text
from cogvlm_sft.conversation import conversation_files
from cogvlm_sft.errors import CheckpointError, RecipeError
from cogvlm_sft.recipe import Recipe
from cogvlm_sft.training.telemetry import read_metrics
from cogvlm_sft.tune.groups import GroupSummary, group_table

RUN_FILE = "run.json"
CARD_FILE = "README.md"
_PACKAGES = ("cogvlm-sft", "torch", "transformers", "trl", "peft", "accelerate")
_LISTED = 3  # evaluations that the card shows: first, middle, last


def data_digests(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of each source: of a build's manifest, which lists digests itself, or of a file."""
    sources = [source.path for source in recipe.data.train]
    if recipe.data.validation is not None:
        sources.append(recipe.data.validation)
    return {str(path): _digest(path) for path in sources}


def _digest(path: Path) -> str:
    manifest = path / "manifest.json"
    digest = hashlib.sha256()
    for file in [manifest] if manifest.is_file() else conversation_files(path):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def write_run_file(recipe: Recipe, groups: Sequence[GroupSummary]) -> None:
    """Write `run.json`, beside its place and renamed."""
    content = {
        "name": f"{recipe.train.output.name}-{secrets.token_hex(4)}",  # at a service of figures
        "versions": {"python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
        "data": data_digests(recipe),
        "groups": [
            {
                "name": group.name,
                "parameters": group.parameters,
                "trainable": group.trainable,
                "learning_rate": group.learning_rate,
            }
            for group in groups
        ],
    }
    write_text(recipe.train.output / RUN_FILE, json.dumps(content, indent=2) + "\n")


def read_run_file(output: Path) -> dict[str, Any]:
    """What `write_run_file` wrote.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        content: dict[str, Any] = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{output / RUN_FILE}: cannot be read: {error}") from None
    return content


def check_same_data(recipe: Recipe) -> None:
    """A run goes on only on the data that it was started on.

    Raises:
        RecipeError: a source's content has changed since.
    """
    before = read_run_file(recipe.train.output)["data"]
    for path, digest in data_digests(recipe).items():
        if before.get(path, digest) != digest:
            raise RecipeError(
                f"{recipe.source}: {path} has changed since the run in {recipe.train.output} "
                f"began (sha256 {before[path][:12]}… then, {digest[:12]}… now); put the old data "
                "back, or choose another train.output"
            )


def write_card(recipe: Recipe, metrics: Path, samples: Path, picture: str) -> Path:
    """Write the checkpoint's `README.md`.

    Args:
        recipe: the run's.
        metrics: its metrics file.
        samples: its answers to fixed prompts; need not exist.
        picture: name of the loss curve beside the card.
    """
    output, train = recipe.train.output, recipe.train
    run = read_run_file(output)
    rows = read_metrics(metrics)
    name = Path(recipe.source).stem
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags: [cogvlm, cogvlm-sft]",
        "---",
        "",
        f"# {output.name}",
        "",
        f"A CogVLM trained with cogvlm-sft by the recipe "
        f"`{name}`: {train.iterations:,} steps of {train.global_batch_size} conversations, "
        f"{_origin(recipe)}.",
        "",
        "```bash",
        f'cogvlm-sft chat {output} --image picture.jpg --question "What is in the picture?"',
        "```",
        "",
        "## Curves",
        "",
        f"![training loss]({picture})",
        "",
        *_figures(rows),
        *_answers(samples),
        "",
        "## What learned",
        "",
        "```",
        group_table([GroupSummary(**group) for group in run["groups"]]),
        "```",
        "",
        "## Data",
        "",
        "| source | weight | sha256 |",
        "|---|---:|---|",
        *(
            f"| `{source.path}` | {source.weight:g} | `{run['data'][str(source.path)]}` |"
            for source in recipe.data.train
        ),
    ]
    if recipe.data.validation is not None:
        path = str(recipe.data.validation)
        lines.append(f"| `{path}` | held out | `{run['data'][path]}` |")
    lines += [
        "",
        "The digest is that of the build's `manifest.json`, or of the file.",
        "",
        "## Versions",
        "",
        ", ".join(f"{package} {number}" for package, number in run["versions"].items()),
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe.to_yaml().rstrip(),
        "```",
        "",
    ]
    card = output / CARD_FILE
    card.write_text("\n".join(lines), encoding="utf-8")
    return card


def _origin(recipe: Recipe) -> str:
    if recipe.model.checkpoint is None:
        return "from fresh weights"
    return f"from `{recipe.model.checkpoint}`"


def _figures(rows: list[dict[str, Any]]) -> list[str]:
    """A table of the first, middle and last figures."""
    losses = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval_loss" in row]
    table = ["| step | training loss |", "|---:|---:|"]
    table += [f"| {row['step']:,} | {row['loss']:.4f} |" for row in _some(losses)]
    if held_out:
        table += ["", "| step | held-out loss | held-out accuracy |", "|---:|---:|---:|"]
        table += [
            f"| {row['step']:,} | {row['eval_loss']:.4f} | {row['eval_accuracy']:.3f} |"
            for row in _some(held_out)
        ]
        table += ["", "Accuracy: conversations whose answers greedy decoding gives word for word."]
    return table


def _answers(samples: Path) -> list[str]:
    if not samples.is_file() or not (rows := read_metrics(samples)):
        return []
    table = ["", f"Answers after step {rows[-1]['step']:,}:", "", "| image | question | answer |"]
    table.append("|---|---|---|")
    for sample in rows[-1]["samples"]:
        cells = (sample["image"] or "", sample["question"], sample["answer"])
        escaped = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
        table.append(f"| {' | '.join(escaped)} |")
    return table


def _some(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(rows) <= _LISTED:
        return rows
    return [rows[0], rows[len(rows) // 2], rows[-1]]
