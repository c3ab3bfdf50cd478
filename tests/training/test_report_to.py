"""Figures that go to a service besides `metrics.jsonl`; nothing leaves the machine here."""

import contextlib
import json
import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from cogvlm_sft import Recipe, RecipeError, train
from cogvlm_sft.training import preflight
from cogvlm_sft.training.provenance import read_run_file
from cogvlm_sft.training.stopping import StopOnSignal, TrainingStopped
from cogvlm_sft.training.telemetry import read_metrics

MakeRecipe = Callable[..., Recipe]


# TensorBoard's protocol buffers were compiled with an older protoc.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(
    make_recipe: MakeRecipe, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    recipe = make_recipe(
        train__report_to="tensorboard", data__validation=world / "train.jsonl", evaluate__every=3
    )
    output = train(recipe).output
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    assert folder.is_relative_to(output)
    events = EventAccumulator(str(folder)).Reload()
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "loss" in row]
    for tag, key in (
        ("train/loss", "loss"),
        ("train/lr/visual_expert", "lr/visual_expert"),
        ("train/mfu", "mfu"),
    ):
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(
            [row[key] for row in rows]
        )
    assert [event.step for event in events.Scalars("eval/accuracy")] == [3, 6]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends this process SIGTERM while it trains the given step."""
    original = StopOnSignal.on_step_end

    def send(self: StopOnSignal, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", send)


@pytest.fixture
def reported(
    make_recipe: MakeRecipe, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[str, list[float]]]:
    """Trains six steps with a stop after the second; the run's name and its losses."""
    monkeypatch.chdir(tmp_path)

    def train_in_two(service: str) -> tuple[str, list[float]]:
        recipe = make_recipe(
            train__report_to=service, data__validation=world / "train.jsonl", evaluate__every=3
        )
        with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
            stop_after(patch, 2)
            train(recipe)
        output = train(recipe).output
        rows = read_metrics(output / "metrics.jsonl")
        return read_run_file(output)["name"], [row["loss"] for row in rows if "loss" in row]

    return train_in_two


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_wandb(
    reported: Callable[[str], tuple[str, list[float]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Offline; one name for the run and its resumption, files in its folder, closed at the end."""
    wandb = pytest.importorskip("wandb", reason="the package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    name, losses = reported("wandb")
    assert wandb.run is None
    assert len(losses) == 6
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    assert not (tmp_path / "wandb").exists()
    written = b"".join(file.read_bytes() for file in files)
    for word in ("cogvlm-sft", "train/lr/visual_expert", "train/mfu", "eval/accuracy"):
        assert word.encode() in written, word


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_trackio(
    reported: Callable[[str], tuple[str, list[float]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Local; one run for the stop, the resumption, and the figures after the last step."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "figures"))
    pytest.importorskip("trackio", reason="the package trackio is not installed")
    name, losses = reported("trackio")
    (file,) = (tmp_path / "figures").rglob("cogvlm-sft*.db")
    with contextlib.closing(sqlite3.connect(file)) as table:
        rows = table.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    assert {run for run, _ in rows} == {name}
    figures = [json.loads(text) for _, text in rows]
    assert [row["train/loss"] for row in figures if "train/loss" in row] == losses
    assert len([row for row in figures if "eval/accuracy" in row]) == 2


def test_uploading_checkpoints_is_refused(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' integration would look for folders that are not there, and fail in mid-run."""
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_LOG_MODEL", "checkpoint")
    with pytest.raises(RecipeError, match="WANDB_LOG_MODEL is 'checkpoint'"):
        train(make_recipe(train__report_to="wandb"))


@pytest.mark.parametrize("service", ["none", "tensorboard"])
def test_only_what_the_recipe_names(make_recipe: MakeRecipe, service: str) -> None:
    from cogvlm_sft.training.arguments import training_arguments

    if service != "none":
        pytest.importorskip(service)
    arguments = training_arguments(make_recipe(train__report_to=service), 1)
    assert arguments.report_to == ([] if service == "none" else [service])
