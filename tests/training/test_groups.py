"""The five parameter groups: a partition by name, and what of them decays."""

from typing import Any

import pytest
import torch
from torch import nn

from cogvlm_sft import CogVLMConfig, CogVLMForCausalLM
from cogvlm_sft.checkpoint.load import make_config
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.tune import (
    GROUPS,
    decays,
    group_of,
    group_table,
    parameter_groups,
    set_trainable,
    summarize_groups,
)


@pytest.fixture(scope="module")
def released() -> CogVLMForCausalLM:
    with torch.device("meta"):
        return CogVLMForCausalLM(CogVLMConfig())


@pytest.fixture
def model(tiny: dict[str, Any]) -> CogVLMForCausalLM:
    return CogVLMForCausalLM(make_config(tiny))


def test_totals_of_the_released_model(released: CogVLMForCausalLM) -> None:
    rates = dict.fromkeys(GROUPS, 1.0)
    sizes = {
        row.name: row.parameters for row in summarize_groups(released, learning_rate=1, rates=rates)
    }
    assert sizes == {
        "language": 6_476_271_616,
        "visual_expert": 6_476_005_376,
        "adapter": 142_622_720,
        "vision_tower": 4_282_641_664,
        "embeddings": 262_144_000,
    }


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.norm.weight", "language"),
        ("base_model.model.model.norm.weight", "language"),
        ("model.layers.3.input_layernorm.weight", "language"),
        ("model.vision.transformer.layers.3.input_layernorm.weight", "vision_tower"),
        ("model.vision.transformer._orig_mod.layers.3.input_layernorm.bias", "vision_tower"),
        ("model.vision.linear_proj.norm1.bias", "adapter"),
        ("model.vision.conv.bias", "adapter"),
        ("model.vision.boi", "adapter"),
        ("_orig_mod.lm_head.weight", "embeddings"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "embeddings"),
        (
            "base_model.model.model.layers.0.self_attn.vision_expert_dense.lora_A.default.weight",
            "visual_expert",
        ),
        (
            "base_model.model.model.layers.0.mlp._orig_mod.language_mlp.up_proj.base_layer.weight",
            "language",
        ),
    ],
)
def test_groups_through_wrappers(name: str, group: str) -> None:
    assert group_of(name) == group


def test_a_parameter_of_no_group_is_an_error(model: CogVLMForCausalLM) -> None:
    model.model.extra = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight.*no parameter group"):
        set_trainable(model, ["language"])


def test_unknown_group_is_an_error(model: CogVLMForCausalLM) -> None:
    with pytest.raises(CheckpointError, match="visual_experts"):
        set_trainable(model, ["visual_experts"])


def test_only_matrices_decay(model: CogVLMForCausalLM) -> None:
    decaying = {name for name, p in model.named_parameters() if decays(name, p)}
    assert decaying
    for name in decaying:
        assert not name.endswith(("boi", "eoi", "bias", "cls_embedding")), name
        assert "norm" not in name
        assert "embed" not in name.replace("patch_embedding.proj", ""), name
    assert "lm_head.weight" in decaying
    assert "model.vision.patch_embedding.proj.weight" in decaying


def test_optimizer_groups_hold_each_trainable_parameter_once(model: CogVLMForCausalLM) -> None:
    rates = {"language": 0.1, "visual_expert": 1.0, "adapter": 1.0, "embeddings": 0.1}
    set_trainable(model, rates)
    groups = parameter_groups(model, learning_rate=1e-5, rates=rates, weight_decay=0.05)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(set(held)) == len(held)
    assert groups[0]["name"] == "visual_expert.decay"
    for group in groups:
        assert group["lr"] == pytest.approx(1e-5 * rates[group["group"]])
        assert group["weight_decay"] == (0.05 if group["name"].endswith(".decay") else 0.0)


def test_a_trainable_parameter_without_a_rate_is_an_error(model: CogVLMForCausalLM) -> None:
    with pytest.raises(CheckpointError, match="has no rate"):
        parameter_groups(model, learning_rate=1e-5, rates={"language": 1.0}, weight_decay=0.0)


def test_table_names_groups_and_rates(model: CogVLMForCausalLM) -> None:
    rates = {"language": 0.1, "visual_expert": 1.0}
    set_trainable(model, rates)
    table = group_table(summarize_groups(model, learning_rate=1e-5, rates=rates))
    lines = {line.split()[0]: line for line in table.splitlines() if line}
    assert lines["language"].endswith("1e-06")
    assert lines["visual_expert"].endswith("1e-05")
    assert lines["vision_tower"].endswith("frozen")
    total = sum(p.numel() for p in model.parameters())
    assert f"{total:,}" in lines["total"]


def test_decay_and_sizes_under_zero_3(model: CogVLMForCausalLM) -> None:
    """Hazard: DeepSpeed leaves an empty vector in place of a matrix that it has split."""
    rates = dict.fromkeys(GROUPS, 1.0)

    def names() -> list[str]:
        groups = parameter_groups(model, learning_rate=1.0, rates=rates, weight_decay=0.1)
        return [f"{group['name']} {len(group['params'])}" for group in groups]

    whole, sizes = names(), summarize_groups(model, learning_rate=1.0, rates=rates)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert names() == whole
    assert summarize_groups(model, learning_rate=1.0, rates=rates) == sizes
