"""Runs on a pretended accelerator (`tests/pretended_device.py`): the same figures as on the CPU.

Nothing may be left on the host that a GPU would refuse, and the host waits for the device a few
times a step, however deep the model.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogvlm_sft import Recipe, train
from cogvlm_sft.cli import main
from cogvlm_sft.training.telemetry import read_metrics

MakeRecipe = Callable[..., Recipe]
DEVICE = Path(__file__).parents[1] / "pretended_device.py"
WAITS = ("tolist", "aten.nonzero.default", "aten._local_scalar_dense.default")

pytestmark = pytest.mark.slow


def on_the_device(*arguments: str) -> tuple[str, dict[str, int]]:
    """A command's output, and what the host waited for."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(DEVICE), *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(done.stderr.splitlines()[-1])


def train_on_the_device(recipe: Recipe, path: Path) -> dict[str, int]:
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    return on_the_device("train", str(path))[1]


def figures(output: Path) -> list[tuple[Any, ...]]:
    names = ("step", "loss", "grad_norm", "eval_loss", "eval_accuracy")
    return [
        tuple(row.get(name, 0) for name in names) for row in read_metrics(output / "metrics.jsonl")
    ]


FROZEN = {"mode": "frozen"}
LORA = {"mode": "lora", "rank": 4, "alpha": 8}
RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "checkpointed": {"train__gradient_checkpointing": True, "tune__vision_tower": FROZEN},
    "mlp recomputed": {"train__gradient_checkpointing": "mlp"},
    "shared pictures": {"data__share_images": True, "data__token_budget": 200},
    "lora": {"tune__language": LORA, "tune__visual_expert": LORA, "tune__adapter": {"mode": "full"},
             "tune__vision_tower": FROZEN, "tune__embeddings": FROZEN},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_figures_of_the_cpu(
    make_recipe: MakeRecipe, world: Path, tmp_path: Path, name: str
) -> None:
    """With held-out figures, sample answers and snapshots."""
    settings = {
        **RUNS[name],
        "data__validation": str(world / "train.jsonl"),
        "evaluate__every": 2,
        "evaluate__prompts": [{"question": "What colour is it?", "image": "00.png"}],
        "evaluate__max_new_tokens": 4,
        "train__iterations": 4,
        "train__save_every": 2,
    }
    if name == "shared pictures":
        rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows):
            row["images"] = [f"{number // 4:02d}.png"]
        album = tmp_path / "album.jsonl"
        album.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings["data__train"] = [{"path": str(album)}]
    if name == "lora":
        start = train(make_recipe(train__iterations=2, train__output=tmp_path / "start")).output
        settings |= {"model__config": None, "model__tokenizer": None, "model__checkpoint": start}
    train(make_recipe(**settings, train__output=tmp_path / "cpu"))
    recipe = make_recipe(**settings, train__output=tmp_path / "device")
    train_on_the_device(recipe, tmp_path / "recipe.yaml")
    found, wanted = figures(tmp_path / "device"), figures(tmp_path / "cpu")
    assert len(found) == len(wanted) == 6
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_the_host_waits_as_often_whatever_the_depth(
    make_recipe: MakeRecipe, tiny: dict[str, Any], tmp_path: Path
) -> None:
    waits = []
    for layers in (2, 6):
        config = copy.deepcopy(tiny)
        config["num_hidden_layers"] = layers
        config["vision_config"]["num_hidden_layers"] = layers
        recipe = make_recipe(
            model__config=config,
            train__output=tmp_path / f"{layers}",
            train__iterations=3,
            train__warmup_iterations=1,
        )
        found = train_on_the_device(recipe, tmp_path / f"{layers}.yaml")
        waits.append({name: found.get(name, 0) for name in WAITS})
    assert waits[0] == waits[1]
    assert 0 < sum(waits[0].values()) <= 3 * 2 * 10  # steps, micro-batches


def test_answers_are_those_of_the_cpu(
    make_recipe: MakeRecipe, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`chat` and `evaluate`, the second with batches of padded rows."""
    run = str(train(make_recipe(train__iterations=3)).output)
    picture = str(world / "images" / "01.png")
    chat = ["chat", run, "--image", picture, "--question", "What colour is it?"]
    chat += ["--max-new-tokens", "8"]
    capsys.readouterr()
    assert main(chat) == 0
    assert on_the_device(*chat)[0] == capsys.readouterr().out != ""

    score = ["evaluate", run, "--task", "exact_match", "--annotations", str(world / "train.jsonl")]
    score += ["--images", str(world / "images"), "--batch-size", "4", "--output"]
    assert main([*score, str(tmp_path / "cpu")]) == 0
    on_the_device(*score, str(tmp_path / "device"))
    answers = [
        [json.loads(line)["answer"] for line in file.read_text().splitlines()]
        for folder in ("cpu", "device")
        for file in (tmp_path / folder).rglob("predictions.jsonl")
    ]
    assert len(answers) == 2
    assert answers[0] == answers[1] != []
