"""Figures that go to a service besides `metrics.jsonl`; nothing leaves the machine here."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cogvlm_sft import Recipe, train
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
    assert [event.step for event in events.Scalars("eval/accuracy")] == [3, 6, 6]


@pytest.mark.parametrize("service", ["none", "tensorboard"])
def test_only_what_the_recipe_names(make_recipe: MakeRecipe, service: str) -> None:
    from cogvlm_sft.training.arguments import training_arguments

    if service != "none":
        pytest.importorskip(service)
    arguments = training_arguments(make_recipe(train__report_to=service), 1)
    assert arguments.report_to == ([] if service == "none" else [service])
