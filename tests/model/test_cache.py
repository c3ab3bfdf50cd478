"""The cache that grows in place holds what transformers' dynamic cache holds."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache, DynamicLayer

from cogvlm_sft.model import cache_cogvlm
from cogvlm_sft.model.cache_cogvlm import GrowingLayer, growing

STEPS = ("one", "one", "one", "many", "crop", "reorder", "select", "repeat", "copy", "reset")


@given(steps=st.lists(st.sampled_from(STEPS), min_size=4, max_size=24))
@settings(max_examples=60, deadline=None)
def test_any_series_of_operations(steps: list[str]) -> None:
    ours: DynamicLayer = GrowingLayer()
    theirs = DynamicLayer()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(cache_cogvlm, "_ROOM", 3)
        for step in ["many", *steps]:
            rows = 2 if ours.keys is None else ours.keys.shape[0]
            if step in ("one", "many"):
                fresh = torch.randn(2, rows, 2, 1 if step == "one" else 5, 4)
                ours.update(fresh[0], fresh[1])
                theirs.update(fresh[0], fresh[1])
            elif step == "copy":
                ours = copy.deepcopy(ours)
            else:
                for layer in (ours, theirs):
                    if step == "crop" and layer.get_seq_length() > 2:
                        layer.crop(-2)
                    elif step == "reorder":
                        layer.reorder_cache(torch.arange(rows).flip(0))
                    elif step == "select" and layer.get_seq_length():
                        layer.batch_select_indices(torch.tensor([rows - 1, 0]))
                    elif step == "repeat" and rows < 8:
                        layer.batch_repeat_interleave(2)
                    elif step == "reset":
                        layer.reset()
            assert ours.get_seq_length() == theirs.get_seq_length()
            if ours.get_seq_length():
                assert torch.equal(ours.keys, theirs.keys)
                assert torch.equal(ours.values, theirs.values)


def test_new_tokens_are_written_in_place() -> None:
    layer = GrowingLayer()
    with torch.no_grad():
        places = {
            layer.update(torch.randn(2, 2, 1, 4), torch.randn(2, 2, 1, 4))[0].data_ptr()
            for _ in range(100)
        }
    assert len(places) == 1


def test_goes_on_outside_of_inference_mode() -> None:
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    with torch.no_grad():
        layer.update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
    keys = torch.ones(1, 1, 1, 4, requires_grad=True)
    layer.update(keys, torch.ones(1, 1, 1, 4))[0].sum().backward()
    assert keys.grad is not None
    assert layer.keys[0, 0, :, 0].tolist() == [0, 0, 1, 1]


def test_other_caches_stay_as_they_are() -> None:
    class Own(DynamicCache):
        pass

    assert not growing(Own()).layers
    filled = DynamicCache([(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))])
    assert type(growing(filled).layers[0]) is DynamicLayer
