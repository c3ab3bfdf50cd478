"""Runs in processes of their own: several together, some of them killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogvlm_sft import Recipe, train
from cogvlm_sft.checkpoint.load import (
    build_model,
    build_processor,
    load_model,
    load_processor,
    make_config,
    save_checkpoint,
)
from cogvlm_sft.training import snapshots
from cogvlm_sft.training.telemetry import read_metrics

MakeRecipe = Callable[..., Recipe]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
SHARDED = Path(__file__).with_name("sharded_on_cpu.py")
SIGNALLED = Path(__file__).with_name("signalled.py")


def command(
    recipe: Recipe, folder: Path, name: str, processes: int = 1, kind: str | None = None
) -> list[str]:
    path = folder / f"{name}.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [
        sys.executable,
        *(launcher if processes > 1 or kind else []),
        *(["-m", "cogvlm_sft.cli", "train"] if kind is None else [str(SHARDED), kind]),
        str(path),
    ]


def run(arguments: list[str]) -> None:
    done = subprocess.run(
        arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr


def signalled(
    arguments: list[str], step: int, number: signal.Signals, rank: int = 0
) -> tuple[int, str]:
    """Exit status and stderr of a run of which one process's group gets a signal in a step.

    Several processes get five seconds to say their last word: torchrun looks at them that often.
    """
    arguments = [*arguments]
    if "--standalone" in arguments:
        arguments.insert(arguments.index("--standalone"), "--monitor-interval=5")
    at = arguments.index("cogvlm_sft.cli") - 1
    program = [str(SIGNALLED), str(step), number.name, str(rank)]
    done = subprocess.run(
        [*arguments[:at], *program, arguments[-1]],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False,
        start_new_session=True,  # the whole process group of the run gets it, and nobody else
    )  # fmt: skip
    return done.returncode, done.stderr


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl") if "loss" in row]


@pytest.fixture
def mixed(world: Path, tmp_path: Path) -> Path:
    """Every second conversation has no picture, so at batch 1 some ranks of a step see none."""
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        row.update(images=[], style="text")
        row["messages"][0]["content"] = row["messages"][0]["content"].removeprefix("<image>\n")
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_one_two_and_four_processes_agree(
    make_recipe: MakeRecipe, mixed: Path, tmp_path: Path
) -> None:
    """1 x batch 4 = 2 x 2 = 4 x 1, losses within 1e-6, with and without pictures in a step."""
    found = []
    for processes in (1, 2, 4):
        output = tmp_path / f"on{processes}"
        recipe = make_recipe(
            data__train=[{"path": str(mixed)}],
            train__output=output,
            train__micro_batch_size=4 // processes,
            train__iterations=6,
        )
        if processes == 1:
            train(recipe)
        else:
            run(command(recipe, tmp_path, f"on{processes}", processes))
        found.append(losses(output))
    assert len(found[0]) == 6
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert found[2] == pytest.approx(found[0], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "afterwards"), [("fsdp2", 1), ("zero2", 2), ("zero3", 2)])
def test_sharded_equals_one_process_and_resumes(
    make_recipe: MakeRecipe, mixed: Path, tmp_path: Path, kind: str, afterwards: int
) -> None:
    """By the shipped configurations, over two processes, some of them without pictures.

    Losses, held-out figures, answers and weights are the same.

    A snapshot of FSDP2 goes on with any number of processes, also without FSDP, one of DeepSpeed
    with as many.
    """
    if kind != "fsdp2":
        pytest.importorskip("deepspeed", reason="the package deepspeed is not installed")

    start = train(make_recipe(train__output=tmp_path / "start", train__iterations=2)).output

    def recipe(name: str, micro: int) -> Recipe:
        return make_recipe(
            model__config=None,
            model__tokenizer=None,
            model__checkpoint=start,
            data__train=[{"path": str(mixed)}],
            train__output=tmp_path / name,
            train__micro_batch_size=micro,
            train__iterations=6,
            train__save_every=3,
            tune__language={"rate": 0.1},
            tune__vision_tower={"mode": "frozen"},
            data__validation=mixed,
            evaluate__every=6,
            evaluate__batch_size=1,
            evaluate__max_new_tokens=4,
            evaluate__prompts=[{"question": "What colour is it?", "image": "00.png"}],
        )

    def assert_equal_to_whole() -> None:
        for name in ("metrics.jsonl", "samples.jsonl"):
            one, other = (read_metrics(tmp_path / run / name)[-1] for run in ("sharded", "whole"))
            assert one.get("samples") == other.get("samples")
            assert one.get("eval_loss") == pytest.approx(other.get("eval_loss"), abs=1e-6)
        assert losses(sharded) == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
        one, other = (
            load_file(tmp_path / name / "model.safetensors") for name in ("sharded", "whole")
        )
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], atol=1e-5, rtol=1e-4)

    train(recipe("whole", 4))
    sharded = tmp_path / "sharded"
    run(command(recipe("sharded", 1), tmp_path, "first", 2, kind))
    assert_equal_to_whole()

    finished = load_file(sharded / "model.safetensors")
    last = snapshots.snapshot_folder(sharded, 6)
    # As if it had been killed while it wrote its second snapshot.
    for name in ("config.json", "model.safetensors"):
        (sharded / name).unlink()
    (last / "snapshot.json").unlink()
    assert snapshots.newest_complete(sharded) == snapshots.snapshot_folder(sharded, 3)
    if kind == "fsdp2":
        found = load_model(last).state_dict()
        for name, value in finished.items():
            assert torch.equal(found[name], value), name
        assert load_processor(last)
        stopped = shutil.copytree(sharded, tmp_path / "stopped")
    run(command(recipe("sharded", 2 // afterwards), tmp_path, "second", afterwards, kind))
    assert_equal_to_whole()
    if kind == "fsdp2":  # and once more, without FSDP
        shutil.rmtree(sharded)
        stopped.rename(sharded)
        train(recipe("sharded", 4))
        assert_equal_to_whole()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_split_model_never_stands_whole(
    make_recipe: MakeRecipe, tiny: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    """Hazard: accelerate has every process, or at best one, hold what FSDP2 then splits."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    config = make_config({**tiny, **sizes})
    folder = tmp_path / "checkpoint"
    model = build_model({**tiny, **sizes})
    save_checkpoint(model, build_processor(config, world / "tokenizer"), folder)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    recipe = make_recipe(
        model__config=None,
        model__checkpoint=folder,
        train__micro_batch_size=1,
        train__output=tmp_path / "split",
    )
    arguments = command(recipe, tmp_path, "split", 2, "fsdp2")
    arguments[-3:] = [str(SHARDED.with_name("split_memory.py")), arguments[-1]]
    done = subprocess.run(
        arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False
    )
    rows = [line.split() for line in done.stdout.splitlines() if re.fullmatch(r"\d+ \d+", line)]
    assert len(rows) == 2, done.stderr
    for peak, part in ((int(one), int(other)) for one, other in rows):
        assert part < 0.51 * whole
        assert peak < 0.95 * whole, "as much as the whole model"


@pytest.mark.slow
def test_fsdp_reduces_in_fp32_after_every_micro_batch(
    make_recipe: MakeRecipe, mixed: Path, tmp_path: Path
) -> None:
    """By accelerate's policy gradients and the loss would be bf16, and whole between micro-batches.

    `sharded_on_cpu.py` looks at the gradients; here the logged losses are finer than bf16, and
    those of one process by autocast, up to its rounding.
    """

    def recipe(name: str, micro: int) -> Recipe:
        return make_recipe(
            model__dtype="bfloat16",
            data__train=[{"path": str(mixed)}],
            train__output=tmp_path / name,
            train__micro_batch_size=micro,
            train__iterations=3,
            tune__vision_tower={"mode": "frozen"},
        )

    run(command(recipe("sharded", 1), tmp_path, "sharded", 2, "fsdp2"))
    found = losses(tmp_path / "sharded")
    assert any(torch.tensor(loss).bfloat16().item() != pytest.approx(loss) for loss in found)
    train(recipe("whole", 4))
    assert found == pytest.approx(losses(tmp_path / "whole"), rel=0.01)


@pytest.mark.slow
def test_processes_stop_together(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """SIGTERM to one of two, then SIGKILL to one of two, then to the end."""
    output = tmp_path / "pair"
    recipe = make_recipe(
        train__output=output, train__iterations=20, train__save_every=5, data__workers=1
    )
    arguments = command(recipe, tmp_path, "pair", 2)

    status, message = signalled(arguments, 7, signal.SIGTERM, rank=1)
    assert status != 0
    assert "goes on from" in message
    newest = snapshots.newest_complete(output)
    assert newest == snapshots.snapshot_folder(output, 7)
    assert [row["step"] for row in read_metrics(output / "metrics.jsonl")][-1] == 7

    # Left alone, process 0 would wait for half an hour.
    status, message = signalled(arguments, 13, signal.SIGKILL, rank=1)
    assert status != 0
    assert "another process of this run is gone, so process 0 stops too" in message
    assert snapshots.newest_complete(output) == snapshots.snapshot_folder(output, 10)
    assert not (output / "config.json").exists()

    run(arguments)
    assert (output / "config.json").exists()
    steps = [row["step"] for row in read_metrics(output / "metrics.jsonl")]
    assert steps == list(range(1, 21))
    whole = make_recipe(train__output=tmp_path / "whole", train__iterations=20, train__save_every=5)
    train(whole)
    assert losses(output) == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


@pytest.mark.slow
def test_sigterm_then_sigkill_then_the_same_weights(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """The data workers, which are of the run's process group at first, outlive the signal."""

    def recipe(name: str) -> Recipe:
        return make_recipe(
            train__output=tmp_path / name,
            train__iterations=40,
            train__save_every=10,
            data__workers=2,
        )

    broken = tmp_path / "broken"
    arguments = command(recipe("broken"), tmp_path, "broken")
    status, message = signalled(arguments, 6, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM, message
    assert "goes on from" in message
    assert snapshots.newest_complete(broken) == snapshots.snapshot_folder(broken, 6)
    assert not (broken / "config.json").exists()

    status, message = signalled(arguments, 27, signal.SIGKILL)
    assert status == -signal.SIGKILL, message
    assert not (broken / "config.json").exists()

    run(arguments)
    train(recipe("whole"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("broken", "whole"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
