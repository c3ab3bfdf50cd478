"""The speed figures of a run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cogvlm_sft import CogVLMConfig, Recipe, train
from cogvlm_sft.checkpoint.load import build_model
from cogvlm_sft.training import throughput
from cogvlm_sft.training.flops import Work, training_flops
from cogvlm_sft.training.telemetry import read_metrics
from cogvlm_sft.training.throughput import Throughput, peak_flops, trained_matrices
from cogvlm_sft.tune import set_trainable


def test_a_window_is_what_was_counted(
    monkeypatch: pytest.MonkeyPatch, tiny: dict[str, Any]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: clock[0])
    config = CogVLMConfig(**tiny)
    types = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    labels = torch.full((2, 10), -100)
    labels[0, 8:], labels[1, 3:6] = 5, 5
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    batch = {"token_type_ids": types, "attention_mask": mask, "labels": labels}
    batch["pixel_values"] = torch.zeros(1, 3, 28, 28)
    speed = Throughput(config, ["visual_expert"], peak_flops=1e9, processes=2)
    speed.count(batch, step=7)
    speed.count(batch, step=7)
    clock[0] = 104.0
    figures = speed.window(8, 4, lambda counts: counts)
    assert figures["conversations_per_second"] == 1.0
    assert figures["supervised_tokens_per_second"] == 2 * 5 / 4
    assert figures["image_tokens_per_second"] == 2 * 6 / 4
    work = Work(tokens=2 * 16, squares=2 * (10**2 + 6**2), images=2, supervised=2 * 5)
    needed = training_flops(config, ["visual_expert"], work)
    assert figures["mfu"] == pytest.approx(needed / (4 * 2e9))
    assert figures["memory_gib"] > 0.01
    assert speed.window(8, 4, lambda counts: counts) == {}


def test_a_run_logs_its_speed(make_recipe: Callable[..., Recipe]) -> None:
    result = train(make_recipe())
    for row in read_metrics(result.output / "metrics.jsonl"):
        assert row["mfu"] > 0
        assert row["supervised_tokens_per_second"] > 0 and row["image_tokens_per_second"] > 0
        # Every picture of this world takes 6 places.
        per_conversation = row["image_tokens_per_second"] / row["conversations_per_second"]
        assert per_conversation == pytest.approx(6)


def test_only_matrices_that_learn_count(tiny: dict[str, Any]) -> None:
    model = build_model(tiny)
    set_trainable(model, ["language", "adapter"])
    model.model.norm.requires_grad_(False)
    assert trained_matrices(model) == {"language", "adapter"}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_data_sheets(monkeypatch: pytest.MonkeyPatch, name: str, peak: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    slice_of_it = f"{name} MIG 1g.10gb"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: slice_of_it)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(512, 512))
    assert peak_flops(torch.device("cuda")) != peak
