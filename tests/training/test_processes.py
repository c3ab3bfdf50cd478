"""Runs in processes of their own: two of them together, and one that is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogvlm_sft import Recipe, train
from cogvlm_sft.training import snapshots
from cogvlm_sft.training.telemetry import read_metrics

MakeRecipe = Callable[..., Recipe]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def command(recipe: Recipe, folder: Path, name: str, processes: int = 1) -> list[str]:
    path = folder / f"{name}.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [
        sys.executable,
        *(launcher if processes > 1 else []),
        "-m",
        "cogvlm_sft.cli",
        "train",
        str(path),
    ]


@pytest.mark.slow
def test_two_processes_equal_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """1 x batch 4 = 2 x batch 2, losses within 1e-6 and the same data in each step."""
    losses = []
    for processes in (1, 2):
        output = tmp_path / f"on{processes}"
        recipe = make_recipe(
            train__output=output, train__micro_batch_size=4 // processes, train__iterations=7
        )
        if processes == 1:
            train(recipe)
            losses.append([row["loss"] for row in read_metrics(output / "metrics.jsonl")])
            continue
        done = subprocess.run(
            command(recipe, tmp_path, f"on{processes}", processes),
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        losses.append([row["loss"] for row in read_metrics(output / "metrics.jsonl")])
    assert len(losses[0]) == 7
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


@pytest.mark.slow
def test_sigterm_then_sigkill_then_the_same_weights(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    def recipe(name: str) -> Recipe:
        return make_recipe(
            train__output=tmp_path / name, train__iterations=150, train__save_every=10
        )

    def run(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(recipe(name), tmp_path, name),
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_a_step_after(output: Path, step: int, process: subprocess.Popen[str]) -> None:
        metrics = output / "metrics.jsonl"
        for _ in range(1200):
            if metrics.is_file() and any(r["step"] > step for r in read_metrics(metrics)):
                return
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        raise AssertionError("the run does not move")

    broken = tmp_path / "broken"
    process = run("broken")
    wait_for_a_step_after(broken, 5, process)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM, message
    assert "goes on from" in message
    newest = snapshots.newest_complete(broken)
    assert newest is not None
    assert not (broken / "config.json").exists()

    process = run("broken")
    wait_for_a_step_after(broken, snapshots.snapshot_step(newest) + 15, process)
    process.kill()
    process.communicate(timeout=60)
    assert not (broken / "config.json").exists()

    process = run("broken")
    message = process.communicate(timeout=300)[1]
    assert process.returncode == 0, message
    train(recipe("whole"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("broken", "whole"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
