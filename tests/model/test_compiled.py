"""torch.compile: one graph a layer for every shape, and the same loss and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from cogvlm_sft.model import CogVLMForCausalLM


# Dynamo looks at what it traces.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"recompute_mlp": True}], ids=["plain", "recomputed"])
def test_layers_are_one_graph_each(small_config, make_batch, options):
    """fullgraph fails at the first break; new lengths must not compile anew."""
    torch._dynamo.reset()
    model = CogVLMForCausalLM(small_config(num_hidden_layers=3)).train()
    if options:
        model.recompute_mlp()
    plain = copy.deepcopy(model)
    counter = CompileCounter()
    for layer in model.model.layers:
        layer.compile(dynamic=True, fullgraph=True, backend=counter)
    frames = []
    for rows in (["i9", "5"], ["i7i3", "2i9", "8"], ["i9i9i9", "i5"], ["9", "9"]):
        batch = make_batch(model.config, rows)
        labels = batch["input_ids"].masked_fill(
            (batch["token_type_ids"] == 1) | (batch["attention_mask"] == 0), -100
        )
        labels[:, :-3] = -100
        batch["labels"] = labels
        losses = []
        for each in (model, plain):
            each.zero_grad()
            loss = each(**batch, supervised_only=True).loss
            loss.backward()
            losses.append(loss)
        torch.testing.assert_close(losses[0], losses[1])
        for (name, left), right in zip(model.named_parameters(), plain.parameters(), strict=True):
            error = (left.grad - right.grad).norm() / right.grad.norm().clamp(min=1e-6)
            assert error < 1e-4, name
        frames.append(counter.frame_count)
    # One graph for the layers before the last and one for the last, whatever the lengths. (The last
    # batch has no picture: an expert without rows is a shape of its own.)
    assert frames[:3] == [2, 2, 2]


def test_recomputing_the_mlp_keeps_less_and_changes_nothing(small_config, make_batch):
    model = CogVLMForCausalLM(small_config()).train()
    batch = make_batch(model.config, ["i9", "i3"])
    batch["labels"] = batch["input_ids"].masked_fill(batch["token_type_ids"] == 1, -100)
    kept, grads = [], []
    for enabled in (False, True):
        model.recompute_mlp(enabled)
        model.zero_grad()
        sizes: list[int] = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**batch, supervised_only=True).loss
        loss.backward()
        kept.append(sum(sizes))
        grads.append([p.grad.clone() for p in model.parameters()])
    assert kept[1] < 0.85 * kept[0]
    assert all(torch.equal(left, right) for left, right in zip(*grads, strict=True))
