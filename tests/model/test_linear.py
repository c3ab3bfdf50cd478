"""The linear layer by oneDNN equals `nn.Linear`, and steps aside wherever it is not meant for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from cogvlm_sft.model import CogVLMConfig, CogVLMForCausalLM, linear_cogvlm
from cogvlm_sft.model.linear_cogvlm import apply_gated_linear, apply_linear, linear

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """oneDNN on whatever processor runs the tests, for the smallest products; shapes multiplied."""
    found: list[torch.Size] = []
    multiply = linear_cogvlm._multiply

    def count(rows: torch.Tensor, *factors: torch.Tensor | None) -> torch.Tensor:
        found.append(rows.shape)
        return multiply(rows, *factors)  # type: ignore[arg-type]

    monkeypatch.setattr(linear_cogvlm, "_onednn_is_faster", lambda: True)
    monkeypatch.setattr(linear_cogvlm, "_SMALL", 1)
    monkeypatch.setattr(linear_cogvlm, "_SMALL_UNRECORDED", 1)
    monkeypatch.setattr(linear_cogvlm, "_multiply", count)
    return found


def results(
    layer: nn.Linear, rows: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor | None]:
    """Output and gradients."""
    rows = rows.clone().requires_grad_()
    layer.zero_grad()
    output = compute(rows)
    output.square().sum().backward()
    return [output.detach(), rows.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(37, 24), (2, 5, 24), (24,), (1, 24)])
def test_values_and_gradients(calls: list[torch.Size], bias: bool, shape: tuple[int, ...]) -> None:
    layer, rows = nn.Linear(24, 56, bias=bias), torch.randn(shape)
    pairs = zip(
        results(layer, rows, partial(apply_linear, layer)),
        results(layer, rows, layer),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(calls) == 3


def test_a_vocabularys_gradient_comes_in_parts(
    calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no transposed copy of all of its logits is made."""
    monkeypatch.setattr(linear_cogvlm, "_PART", 16)
    layer, rows = nn.Linear(24, 56, bias=False), torch.randn(37, 24)
    ours, theirs = (results(layer, rows, way) for way in (partial(apply_linear, layer), layer))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    assert [shape[0] for shape in calls if shape[1] == 37] == [16, 16, 16, 8]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_gated(frozen: bool, autocast: bool) -> None:
    """Values and gradients of the plain expression, also under autocast with an fp32 weight."""
    layer = nn.Linear(24, 40, bias=False).requires_grad_(not frozen)
    found = []
    for compute in (
        lambda gate, up: apply_gated_linear(layer, gate, up),
        lambda gate, up: layer(nn.functional.silu(gate) * up),
    ):
        torch.manual_seed(0)
        dtype = torch.bfloat16 if autocast else torch.float32
        gate, up = (torch.randn(9, 24, dtype=dtype, requires_grad=True) for _ in range(2))
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = compute(gate, up)
        output.float().square().sum().backward()
        found.append([output, gate.grad, up.grad, layer.weight.grad])
    tolerance = 0.03 if autocast else 1e-5
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_transposed_and_sliced_factors(calls: list[torch.Size]) -> None:
    rows, weight = torch.randn(64, 40).t(), torch.randn(90, 64)[10:50:2]
    torch.testing.assert_close(linear(rows, weight), rows @ weight.t(), rtol=1e-5, atol=1e-5)
    assert calls


def test_what_is_frozen_is_not_computed(calls: list[torch.Size]) -> None:
    layer = nn.Linear(24, 56).requires_grad_(False)
    apply_linear(layer, torch.randn(8, 24, requires_grad=True)).sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        apply_linear(layer, torch.randn(8, 24))
    assert len(calls) == 3


def test_steps_aside(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(24, 56)
    rows = torch.randn(8, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert apply_linear(layer, rows).dtype == torch.bfloat16
    apply_linear(layer, rows[:0]).sum().backward()
    assert layer.weight.grad is not None and not layer.weight.grad.any()
    apply_linear(nn.Linear(24, 56).double(), rows.double())
    apply_linear(nn.Linear(24, 56, device="meta"), rows.to("meta"))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    apply_linear(layer, rows)
    assert not calls


def test_other_layers_are_called_as_they_are(calls: list[torch.Size]) -> None:
    """Adapters, and layers that somebody watches or whose weight comes only with the call."""
    model: Any = nn.Sequential(nn.Linear(24, 56))
    rows, layer = torch.randn(8, 24), model[0]
    expected = layer(rows)
    handle = layer.register_forward_hook(lambda *_: torch.zeros(1))
    assert not apply_linear(layer, rows).any()
    handle.remove()
    layer.forward = lambda rows: rows[:, :1]
    assert apply_linear(layer, rows).shape == (8, 1)
    del layer.forward
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["0"])).base_model.model[0]
    torch.testing.assert_close(apply_linear(adapted, rows), expected)
    assert not calls


def test_a_step_of_the_model(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient, with and without oneDNN."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_heads": 2,
              "image_size": 28, "num_positions": 5}  # fmt: skip
    torch.manual_seed(0)
    model = CogVLMForCausalLM(
        CogVLMConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=2, vision_config=vision)
    ).train()  # fmt: skip
    types = torch.zeros(2, 32, dtype=torch.long)
    types[:, 1:7] = 1
    ids = torch.randint(3, 300, (2, 32))
    batch = {"input_ids": ids, "token_type_ids": types, "labels": ids.where(ids % 2 == 0, -100),
             "pixel_values": torch.randn(2, 3, 28, 28)}  # fmt: skip

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(**batch, supervised_only=True).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    ours, used = step(), len(calls)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    theirs = step()
    assert used == len(calls) > 50
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-5 * max(float(other.norm()), 1e-3)


def test_rows_beside_frozen_weights_are_not_kept(calls: list[torch.Size]) -> None:
    """As in torch: activations of a frozen layer are freed, which an adapter's memory rests on."""
    layer, rows = nn.Linear(24, 56, bias=False), torch.randn(37, 24, requires_grad=True)
    kept: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    for learns, expected in ((True, [(37, 24), (56, 24)]), (False, [(56, 24)])):
        layer.weight.requires_grad_(learns)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = apply_linear(layer, rows)
        assert kept == [torch.Size(shape) for shape in expected]
        output.sum().backward()
    assert calls
