"""Operations by formula against torch's own counter."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cogvlm_sft import CogVLMConfig, CogVLMForCausalLM
from cogvlm_sft.checkpoint.load import build_model
from cogvlm_sft.training.flops import Work, forward_flops, training_flops
from cogvlm_sft.tune import GROUPS, set_trainable


def test_a_forward_pass_of_the_released_model() -> None:
    """At 490 px with 200 tokens of text: 11.17 T tower, 0.35 T adapter, 18.50 T linears."""
    config = CogVLMConfig()
    part = forward_flops(config, Work(tokens=1428, squares=1428**2, images=1, supervised=1428))
    assert part["vision_tower"] / 1e12 == pytest.approx(11.17, abs=0.02)
    assert (part["adapter"] + part["projection"]) / 1e12 == pytest.approx(0.35, abs=0.01)
    assert (part["language"] + part["visual_expert"]) / 1e12 == pytest.approx(18.50, rel=0.03)
    assert part["head"] / 1e12 == pytest.approx(0.37, abs=0.01)


@pytest.fixture
def batch(tiny: dict[str, Any]) -> Iterator[tuple[CogVLMForCausalLM, dict[str, torch.Tensor]]]:
    """One row of BOS, a picture of 6 tokens and 25 of text, the last 10 supervised."""
    model = build_model(tiny, attention="eager")
    types = torch.zeros(1, 32, dtype=torch.long)
    types[0, 1:7] = 1
    ids = torch.randint(3, 300, (1, 32))
    labels = torch.full((1, 32), -100)
    labels[0, 22:] = ids[0, 22:]
    yield (
        model,
        {
            "input_ids": ids,
            "token_type_ids": types,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(1, 3, 28, 28),
            "labels": labels,
        },
    )


@pytest.mark.parametrize(
    "trained",
    [GROUPS, ("visual_expert", "adapter"), ("language", "visual_expert", "adapter", "embeddings")],
    ids=["all", "pretraining", "alignment"],
)
def test_a_step_is_what_torch_counts(
    batch: tuple[CogVLMForCausalLM, dict[str, torch.Tensor]],
    trained: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the operation, after what torch counts and nobody needs is taken off."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # products that torch counts
    model, inputs = batch
    set_trainable(model, trained)
    with FlopCounterMode(display=False) as counter:
        model(**inputs, supervised_only=True).loss.backward()
    needed = training_flops(model.config, trained, Work(32, 32**2, 1, 10))

    # The last layer asks from the first position that is read to the end of the row: the last token
    # asks too, and nobody reads it.
    queries = 2 * 64 * 64 * (2 + ("language" in trained))
    scores = 3 * 4 * 64 * 32
    # Eager attention builds the full square of the first layer's scores; half of it is masked.
    masked = 3 * 4 * 64 * 32**2 / 2
    assert counter.get_total_flops() - queries - scores - masked == pytest.approx(needed, rel=1e-3)
