"""Group x {frozen, full, lora} x {4 bits, not}: what changes is what the recipe says, or a reason.

A combination that makes sense is trained for three steps; the names of all tensors that changed are
compared with the names that should have.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from cogvlm_sft import CogVLMConfig, CogVLMForCausalLM, Recipe, RecipeError
from cogvlm_sft.checkpoint.load import load_model
from cogvlm_sft.model import attention_cogvlm
from cogvlm_sft.tune.adapters import apply_tuning
from cogvlm_sft.tune.groups import GROUPS, group_of
from cogvlm_sft.tune.naming import LINEARS, linears_of

MakeRecipe = Callable[..., Recipe]
QUANTIZABLE = ("language", "visual_expert", "vision_tower")
REFUSED = {
    ("embeddings", "lora", False): "low-rank factors are for linears inside the layers",
    ("embeddings", "lora", True): "low-rank factors are for linears inside the layers",
    **{(group, "full", True): "which take no gradient" for group in QUANTIZABLE},
}
COMBINATIONS = [
    (group, mode, quantized)
    for group in GROUPS
    for mode in ("frozen", "full", "lora")
    for quantized in (False, True)
]


def recipe_for(make_recipe: MakeRecipe, group: str, mode: str, quantized: bool) -> Recipe:
    """One group in the mode; another one, in full, so that a frozen one leaves something to do."""
    other = "embeddings" if group == "adapter" else "adapter"
    modes = {name: {"mode": "frozen"} for name in GROUPS}
    modes |= {other: {"mode": "full"}, group: {"mode": mode}}
    changes = {f"tune__{name}": treatment for name, treatment in modes.items()}
    if quantized:
        # A group that is never quantised stands beside the usual 4-bit ones.
        groups = [group] if group in QUANTIZABLE else ["language", "visual_expert"]
        changes["model__quantize"] = {"groups": groups}
    return make_recipe(**changes)


def load(recipe: Recipe) -> CogVLMForCausalLM:
    quantize = recipe.model.quantize.groups if recipe.model.quantize else ()
    assert recipe.model.checkpoint is not None
    model = load_model(recipe.model.checkpoint, quantize=quantize)
    apply_tuning(model, recipe.tune)
    return model


def train_steps(model: nn.Module, batch: dict[str, torch.Tensor], steps: int = 3) -> None:
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.0)
    model.train()
    for _ in range(steps):  # factors of the input learn from the second step on
        optimizer.zero_grad()
        model(**batch, use_cache=False, supervised_only=True).loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("group", "mode", "quantized"), COMBINATIONS)
def test_what_changes(
    make_recipe: MakeRecipe,
    batch: dict[str, torch.Tensor],
    group: str,
    mode: str,
    quantized: bool,
) -> None:
    if reason := REFUSED.get((group, mode, quantized)):
        with pytest.raises(RecipeError, match=reason) as caught:
            recipe_for(make_recipe, group, mode, quantized)
        assert f"tune.{group}.mode is {mode}" in str(caught.value)
        return
    recipe = recipe_for(make_recipe, group, mode, quantized)
    model = load(recipe)
    four_bit = {n for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    held = recipe.model.quantize.groups if recipe.model.quantize else ()
    assert {name.removesuffix(".base_layer") for name in four_bit} == {
        name for part in held for name in linears_of(model, part)
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_steps(model, batch)
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}

    other = "embeddings" if group == "adapter" else "adapter"
    parameters = {name for name, _ in model.named_parameters()}
    expected = {name for name in parameters if group_of(name) == other}
    if mode == "full":
        expected |= {name for name in parameters if group_of(name) == group}
    if mode == "lora":
        expected |= {
            f"{name}.{factor}.default.weight"
            for name in linears_of(model, group)
            for factor in ("lora_A", "lora_B")
        }
    assert changed == expected
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in expected), name


def test_two_groups_with_their_own_rank_scale_and_dropout(make_recipe: MakeRecipe) -> None:
    model = load(
        make_recipe(
            tune__language={"mode": "lora", "rank": 2, "alpha": 3.0, "dropout": 0.25},
            tune__visual_expert={"mode": "lora", "rank": 4, "alpha": 8.0, "variant": "rslora"},
        )
    )
    for group, rank, scale, dropout in (
        ("language", 2, 3.0 / 2, 0.25),
        ("visual_expert", 4, 8.0 / 4**0.5, 0.0),
    ):
        for name in linears_of(model, group):
            layer = model.get_submodule(name)
            assert layer.r["default"] == rank
            assert layer.scaling["default"] == pytest.approx(scale)
            assert getattr(layer.lora_dropout["default"], "p", 0.0) == dropout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tune__visual_expert": {"mode": "full", "rank": 4}}, r"rank is 4, but .*mode is full"),
        ({"tune__language": {"mode": "frozen", "variant": "dora"}}, "variant belongs to mode lora"),
        ({"tune__language": {"mode": "frozen", "rate": 0.1}}, r"rate is 0\.1, but .* is frozen"),
        (
            {
                "tune__language": {"mode": "lora", "variant": "dora"},
                "tune__visual_expert": {"mode": "lora"},
            },
            "Use dora in all or none",
        ),
        (
            {
                "tune__visual_expert": {"mode": "lora", "variant": "pissa"},
                "model__quantize": "nf4",
            },
            "which cannot be changed",
        ),
        (
            {"model__checkpoint": None, "model__config": {}, "model__tokenizer": "t"},
            "random weights, which an adapter does not hold",
        ),
        (
            {"tune__visual_expert": {"mode": "full"}, "model__quantize": "nf4"},
            "in 4 bits, which take no gradient",
        ),
        ({"tune__embeddings": {"mode": "lora"}}, "low-rank factors are for linears inside"),
        ({"model__quantize": "int4"}, r"model\.quantize\.type is 'int4'.*expected 'nf4'"),
        ({"model__quantize": {"groups": ["embeddings"]}}, "expected 'language', 'visual_expert'"),
        ({"model__quantize": {"groups": []}}, "1 item"),
    ],
)
def test_senseless_settings_are_refused(
    make_recipe: MakeRecipe, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe(**changes)


@pytest.mark.parametrize("second", [False, True], ids=["CogVLM", "CogVLM2"])
def test_every_linear_of_the_layers_has_its_group(second: bool) -> None:
    """The patterns against the partition by parameter names; `lm_head` is no target."""
    config = CogVLMConfig()
    if second:
        vision = {"image_size": 1344, "num_positions": 9217}
        config = CogVLMConfig(num_multi_query_heads=8, vision_config=vision)
    with torch.device("meta"):
        model = CogVLMForCausalLM(config)
    linears = {
        n: group_of(f"{n}.weight") for n, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    found = {name: group for group in LINEARS for name in linears_of(model, group)}
    assert found == {name: group for name, group in linears.items() if name != "lm_head"}
    counts = [sum(g == group for g in found.values()) for group in LINEARS]
    assert counts == [160, 160, 4, 252]


def test_held_out_passes_leave_4_bit_weights_as_they_are(
    base: Path, batch: dict[str, torch.Tensor]
) -> None:
    """Hazard: on CPUs with bf16 instructions bitsandbytes repacks them in eval mode, rounded."""
    model = load_model(base, quantize=["language", "visual_expert"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    words = torch.randint(3, 320, (1, 5))
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        model(words)  # no rows for the visual expert: bitsandbytes' kernel dies of that
    model.train()
    torch.testing.assert_close(model(**batch, use_cache=False).logits, logits, atol=1e-5, rtol=0)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("quantized", [["language", "visual_expert"], ["visual_expert"]])
def test_attention_beside_4_bit_weights_gets_the_dtype_it_is_planned_for(
    base: Path,
    batch: dict[str, torch.Tensor],
    quantized: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hazard: a 4-bit linear gives its input's dtype; states of fp32 embeddings would stay fp32."""
    model = load_model(base, dtype="bfloat16", quantize=quantized)
    model.get_input_embeddings().float()  # as embeddings that learn are held
    seen = []
    attend = attention_cogvlm.attend

    def watch(*parts: Any) -> torch.Tensor:
        seen.extend(part.dtype for part in parts[:3])
        return attend(*parts)

    monkeypatch.setattr(attention_cogvlm, "attend", watch)
    labels = batch["input_ids"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch | {"labels": labels}, supervised_only=True).loss
    loss.backward()
    assert seen == [torch.bfloat16] * 6
    assert loss.dtype == torch.float32
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None and gradient.dtype == torch.float32 and gradient.any()
