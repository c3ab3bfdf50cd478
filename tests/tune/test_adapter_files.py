"""Adapter folders: PEFT reads ours, we read PEFT's, and what does not fit is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from cogvlm_sft import CheckpointError, CogVLMForCausalLM, Recipe
from cogvlm_sft.checkpoint.adapter import quantized_groups
from cogvlm_sft.checkpoint.load import build_model, load_model
from cogvlm_sft.checkpoint.merge import merge
from cogvlm_sft.tune.adapters import AdapterFiles, apply_tuning, load_adapter

MakeRecipe = Callable[..., Recipe]
FROZEN = {"mode": "frozen"}
# PEFT asks transformers 5 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

VARIANTS = {
    "lora": {"language": {"mode": "lora", "rank": 3, "alpha": 5.0}},
    "rslora": {"visual_expert": {"mode": "lora", "rank": 4, "variant": "rslora"}},
    "dora": {
        "visual_expert": {"mode": "lora", "rank": 4, "variant": "dora"},
        "vision_tower": {"mode": "lora", "rank": 2, "variant": "dora"},
    },
    "pissa": {"visual_expert": {"mode": "lora", "rank": 4, "variant": "pissa"}},
    "mixed": {
        "language": {"mode": "lora", "rank": 2, "variant": "rslora"},
        "visual_expert": {"mode": "lora", "rank": 4, "dropout": 0.5},
        "vision_tower": {"mode": "lora", "rank": 3, "variant": "pissa"},
        "adapter": {"mode": "lora", "rank": 5},
    },
}


def trained(
    recipe: Recipe, batch: dict[str, torch.Tensor], steps: int = 3
) -> tuple[CogVLMForCausalLM, AdapterFiles]:
    """The base after a few steps by the recipe's groups."""
    base = recipe.model.checkpoint
    assert base is not None
    model = load_model(base)
    apply_tuning(model, recipe.tune)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
    model.eval()
    return model, AdapterFiles(recipe.tune, str(base))


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch, use_cache=False).logits
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_peft_and_our_loader_read_what_was_trained(
    make_recipe: MakeRecipe,
    batch: dict[str, torch.Tensor],
    base: Path,
    tmp_path: Path,
    variant: str,
) -> None:
    """The GLU, boi and eoi learn in full beside the factors, and travel in the same file."""
    tune = {"visual_expert": FROZEN, **VARIANTS[variant]}
    model, files = trained(make_recipe(**{f"tune__{k}": v for k, v in tune.items()}), batch)
    files.save(model, tmp_path)
    expected = logits(model, batch)
    assert (logits(load_model(base), batch) - expected).abs().max() > 1e-2

    plain = PeftModel.from_pretrained(load_model(base), str(tmp_path))
    torch.testing.assert_close(logits(plain, batch), expected, atol=1e-5, rtol=1e-5)
    ours = load_model(tmp_path)
    torch.testing.assert_close(logits(ours, batch), expected, atol=1e-5, rtol=1e-5)
    assert ours.state_dict().keys() == load_model(base).state_dict().keys()

    again, _ = trained(make_recipe(**{f"tune__{k}": v for k, v in tune.items()}), batch, steps=0)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again, batch), expected, atol=1e-5, rtol=1e-5)


def test_only_full_parts_beside_4_bit_weights(
    make_recipe: MakeRecipe, batch: dict[str, torch.Tensor], base: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tune__visual_expert=FROZEN, model__quantize="nf4")
    assert recipe.writes_adapter
    model, files = trained(make_recipe(tune__visual_expert=FROZEN), batch)
    files.save(model, tmp_path)
    for reader in (
        load_model(tmp_path),
        PeftModel.from_pretrained(load_model(base), str(tmp_path)),
    ):
        torch.testing.assert_close(logits(reader, batch), logits(model, batch))


@pytest.mark.parametrize("second", [False, True], ids=["CogVLM", "CogVLM2"])
def test_an_adapter_of_the_official_shape_loads(
    world: Path, base: Path, tmp_path: Path, second: bool
) -> None:
    """CogVLM2's demo: rank 8, alpha 32, target `vision_expert_query_key_value`, by plain PEFT."""
    config = json.loads((base / "config.json").read_text())
    if second:
        config["num_multi_query_heads"] = 2
    fields = {k: config[k] for k in ("vocab_size", "hidden_size", "intermediate_size")}
    fields |= {k: config[k] for k in ("num_hidden_layers", "num_attention_heads", "vision_config")}
    fields |= {"num_multi_query_heads": config.get("num_multi_query_heads")}
    vision = {k: v for k, v in config["vision_config"].items() if k in _VISION}
    root = tmp_path / "base"
    build_model({**fields, "vision_config": vision}).save_pretrained(root)
    official = get_peft_model(
        load_model(root),
        LoraConfig(
            r=8,
            lora_alpha=32,
            lora_dropout=0.1,
            target_modules=["vision_expert_query_key_value"],
            task_type="CAUSAL_LM",
        ),
    ).eval()
    for name, parameter in official.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    official.save_pretrained(str(tmp_path / "adapter"))
    model = load_model(tmp_path / "adapter", base=root)
    ids = torch.randint(3, 320, (1, 18))
    types = torch.zeros_like(ids)
    types[:, 1 : 1 + model.config.num_image_tokens] = 1
    row = {"input_ids": ids, "token_type_ids": types, "pixel_values": torch.randn(1, 3, 28, 28)}
    torch.testing.assert_close(logits(model, row), logits(official, row), atol=1e-5, rtol=1e-5)


QKV = "vision_expert_query_key_value"
OF_PEFT: dict[str, dict[str, Any]] = {
    "DoRA": {"target_modules": [QKV], "use_dora": True},
    "every linear": {"target_modules": "all-linear"},
    "whole modules": {"target_modules": [QKV], "modules_to_save": ["vision.linear_proj"]},
    "whole embeddings": {"target_modules": [QKV], "modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings": {"target_modules": [QKV, "embed_tokens", "lm_head"]},
    "biases": {"target_modules": ["query_key_value"], "bias": "all"},
    "biases of factors": {"target_modules": ["query_key_value"], "lora_bias": True},
    "a convolution": {"target_modules": [QKV, "patch_embedding.proj"]},
    "some layers": {"target_modules": [QKV], "layers_to_transform": [1]},
    "patterns": {"target_modules": [QKV], "rank_pattern": {f"layers.1.self_attn.{QKV}": 3}},
}


@pytest.mark.parametrize("kind", OF_PEFT)
# PEFT says so of every embedding that it saves.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
# And takes a bias of a factor for an ungathered one.
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
def test_any_lora_of_peft_loads_and_merges(
    base: Path, batch: dict[str, torch.Tensor], tmp_path: Path, kind: str
) -> None:
    """Whatever it holds beside factors, and under whichever names PEFT writes it."""
    wrapped = get_peft_model(load_model(base), LoraConfig(**OF_PEFT[kind])).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    expected = logits(wrapped, batch)
    assert (logits(load_model(base), batch) - expected).abs().max() > 1e-2
    loaded = load_model(tmp_path / "adapter", base=base)
    torch.testing.assert_close(logits(loaded, batch), expected, atol=1e-4, rtol=1e-4)
    merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    merged = load_model(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-4, rtol=1e-4)


def test_what_only_peft_can_read_is_said(base: Path, tmp_path: Path) -> None:
    """Deltas of single tokens are neither factors nor whole weights."""
    config = LoraConfig(target_modules=[QKV], trainable_token_indices=[3, 4])
    get_peft_model(load_model(base), config).save_pretrained(str(tmp_path / "adapter"))
    for read in (
        lambda: load_model(tmp_path / "adapter", base=base),
        lambda: merge(tmp_path / "adapter", tmp_path / "merged", base=base),
    ):
        with pytest.raises(CheckpointError, match="holds more than factors and whole weights"):
            read()
    assert not (tmp_path / "merged").exists()


def test_whole_weights_do_not_go_into_4_bit_ones(
    make_recipe: MakeRecipe, batch: dict[str, torch.Tensor], base: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tune__language={"mode": "full", "rate": 0.1})
    model, files = trained(recipe, batch, steps=1)
    files.save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"merge the adapter \(`cogvlm-sft checkpoint merge`"):
        load_model(tmp_path, quantize=["language"])
    load_model(tmp_path, quantize=["visual_expert"])


def test_factors_of_no_target_are_said(adapter: Path) -> None:
    settings(adapter, target_modules=[QKV], rank_pattern={}, alpha_pattern={})
    with pytest.raises(CheckpointError, match=r"have no place in this model with the targets"):
        load_model(adapter)


_VISION = (
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_hidden_layers",
    "image_size",
    "patch_size",
    "num_positions",
)


@pytest.fixture
def adapter(make_recipe: MakeRecipe, batch: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    model, files = trained(make_recipe(), batch, steps=1)
    folder = tmp_path / "adapter"
    folder.mkdir()
    files.save(model, folder)
    return folder


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    edit(state)
    save_file(state, file)


def settings(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


FACTOR = "base_model.model.model.layers.0.self_attn.vision_expert_dense.lora_A.weight"


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: change(f, lambda s: s.pop(FACTOR)), "no lora_A for .*vision_expert_dense"),
        (
            lambda f: change(f, lambda s: s.update({"x.lora_A.weight": torch.zeros(2, 2)})),
            "have no place in this model .* first 'x.lora_A.weight'",
        ),
        (
            lambda f: change(f, lambda s: s.update({FACTOR: torch.zeros(4, 3)})),
            r"\(4, 3\), expected \(4, 64\)",
        ),
        (lambda f: settings(f, base_model_name_or_path="nowhere"), "nowhere does not exist here"),
        (lambda f: settings(f, base_model_name_or_path=None), "names no base"),
        (lambda f: settings(f, peft_type="IA3"), "of type IA3, expected LORA"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "are not opened"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not an adapter's configuration"),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 40),
            "damaged or incomplete",
        ),
    ],
)
def test_damaged_or_foreign_adapters(
    adapter: Path, harm: Callable[[Path], object], words: str
) -> None:
    harm(adapter)
    with pytest.raises(CheckpointError, match=words):
        load_model(adapter)


@pytest.mark.parametrize(
    "note", [{"groups": ["languages"], "dtype": "float32"}, {"groups": [], "dtype": "nn"}, [], 1]
)
def test_a_damaged_note_of_four_bit_groups(adapter: Path, note: object) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"quantized": json.dumps(note)})
    with pytest.raises(CheckpointError, match="a damaged note"):
        quantized_groups(adapter)


def test_a_base_named_from_where_the_training_ran(
    adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe's paths are relative to the working directory, which is another one later."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "base").symlink_to(base)
    settings(adapter, base_model_name_or_path="checkpoints/base")
    monkeypatch.chdir(base)
    load_model(adapter)
    (tmp_path / "checkpoints" / "base").unlink()
    with pytest.raises(CheckpointError, match=r"base checkpoint checkpoints/base does not exist"):
        load_model(adapter)


def test_a_base_that_is_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "other")
    with pytest.raises(CheckpointError, match="must be a whole checkpoint"):
        load_model(adapter, base=tmp_path / "other")
