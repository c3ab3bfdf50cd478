"""Merging by the command line: equal to base + adapter, from snapshots too, or nothing is left."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogvlm_sft import CheckpointError, CogVLMForCausalLM, Recipe, train
from cogvlm_sft.checkpoint import merge as merging
from cogvlm_sft.checkpoint.load import load_config, load_model, load_processor
from cogvlm_sft.checkpoint.merge import merge
from cogvlm_sft.checkpoint.probe import probe_batch
from cogvlm_sft.cli import main
from cogvlm_sft.tune.adapters import apply_tuning, load_adapter

MakeRecipe = Callable[..., Recipe]


def beside(recipe: Recipe, folder: Path) -> CogVLMForCausalLM:
    """The unquantised base with the adapter's factors beside its weights."""
    assert recipe.model.checkpoint is not None
    model = load_model(recipe.model.checkpoint)
    apply_tuning(model, recipe.tune)
    load_adapter(model, folder)
    return model.eval()


def share(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.slow
def test_a_qlora_run_and_its_snapshot_merge(
    make_recipe: MakeRecipe,
    world: Path,
    batch: dict[str, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make_recipe(
        model__quantize="nf4",
        tune__language={"mode": "lora", "rank": 2, "variant": "rslora"},
        train__iterations=4,
        train__save_every=2,
        train__optimizer="paged_adamw_8bit",
    )
    run = train(recipe).output
    batch = {name: value for name, value in batch.items() if name != "labels"}
    for number, folder in enumerate((run, run / "snapshots" / "step-00000002")):
        out = tmp_path / f"merged{number}"
        assert main(["checkpoint", "merge", str(folder), "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert "20 linears merged" in printed and "the 4-bit model it was trained on" in printed
        assert not [file for file in out.iterdir() if "adapter" in file.name]
        merged = CogVLMForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert load_processor(out)
        # The file that llama.cpp's converter reads.
        pieces = (world / "tokenizer" / "tokenizer.model").read_bytes()
        assert (out / "tokenizer.model").read_bytes() == pieces
        expected = beside(recipe, folder)
        with torch.no_grad():
            assert share(merged(**batch).logits, expected(**batch).logits) <= 1e-5
    assert main(["checkpoint", "merge", str(run), "--out", str(out)]) == 2
    assert "exists; choose another folder" in capsys.readouterr().err


def test_merging_into_a_sharded_base_in_bf16(
    make_recipe: MakeRecipe, world: Path, base: Path, tmp_path: Path
) -> None:
    """Layout, dtypes and shards are the base's; the rounding to bf16 is told from the merge."""
    half = tmp_path / "half"
    load_model(base, dtype="bfloat16").save_pretrained(half, max_shard_size="150KB")
    shards = sorted(half.glob("*.safetensors"))
    assert len(shards) > 3
    recipe = make_recipe(model__checkpoint=half, model__tokenizer=world / "tokenizer")
    run = train(recipe).output
    report = merge(run, tmp_path / "merged")
    assert report.difference <= 1e-5 < report.rounded < 0.05
    assert report.four_bit is None and report.linears == 10
    for file in shards:
        with (
            safe_open(file, framework="pt") as before,
            safe_open(tmp_path / "merged" / file.name, framework="pt") as after,
        ):
            assert set(before.keys()) == set(after.keys())
            for name in before.keys():  # noqa: SIM118 - not a mapping
                old, new = before.get_tensor(name), after.get_tensor(name)
                assert old.dtype == new.dtype
                trained = "vision_expert" in name or "vision_mlp" in name
                # Nobody reads what the last layer makes of picture positions behind its keys.
                trained &= "layers.1.mlp" not in name and "1.self_attn.vision_expert_d" not in name
                trained |= name.startswith(("model.vision.linear_proj", "model.vision.boi"))
                trained |= name == "model.vision.eoi"
                assert torch.equal(old, new) != trained, name
    index = "model.safetensors.index.json"
    assert json.loads((half / index).read_text()) == json.loads(
        (tmp_path / "merged" / index).read_text()
    )
    load_model(tmp_path / "merged")


def test_a_wrong_merge_is_found_and_leaves_nothing(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(make_recipe(train__iterations=2)).output
    original = merging._Merge.merged

    def twice(self: merging._Merge, name: str) -> torch.Tensor:
        weight = original(self, name)
        return 1.01 * weight if "layers.1.self_attn.vision_expert_dense" in name else weight

    monkeypatch.setattr(merging._Merge, "merged", twice)
    with pytest.raises(CheckpointError, match=r"differ by .* expected at most 1e-05"):
        merge(run, tmp_path / "merged")
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


def test_mistakes(make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        merge(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(CheckpointError, match="needs no merging"):
        merge(base, tmp_path / "out")
    run = train(make_recipe(train__iterations=2, train__save_every=1)).output
    (run / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"not finished; .*step-00000002"):
        merge(run, tmp_path / "out")
    snapshot = run / "snapshots" / "step-00000001"
    settings = json.loads((snapshot / "adapter_config.json").read_text())
    settings["init_lora_weights"] = "pissa"
    (snapshot / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="changes the base's weights"):
        merge(snapshot, tmp_path / "out")
    settings["init_lora_weights"], settings["base_model_name_or_path"] = True, 5
    (snapshot / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="names no base checkpoint"):
        merge(snapshot, tmp_path / "out")
    weights = load_file(snapshot / "adapter_model.safetensors")
    dropped = next(name for name in weights if ".lora_B." in name)
    module = dropped.partition(".lora_B")[0]
    half = {name: tensor for name, tensor in weights.items() if name != dropped}
    save_file(half, snapshot / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="no lora_B for "):
        merge(snapshot, tmp_path / "out", base=base)
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith(module)}
    save_file(rest, snapshot / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"no lora_A for .* one of the targets"):
        merge(snapshot, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tower", ["frozen", "full"])
def test_an_adapter_remembers_its_picture_size(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path, tower: str
) -> None:
    """Trained at twice its base's size, it loads, merges and answers at that size."""
    recipe = make_recipe(
        model__image_size=56, tune__vision_tower={"mode": tower}, train__iterations=2
    )
    run = train(recipe).output
    assert load_config(run).vision_config.image_size == 56
    merge(run, tmp_path / "merged")
    batch = probe_batch(load_config(run))
    with torch.no_grad():
        worn = load_model(run)(**batch).logits
        merged = load_model(tmp_path / "merged")(**batch).logits
    assert load_processor(tmp_path / "merged").num_image_tokens == 18
    assert share(merged, worn) <= 1e-5
    back = load_model(run, image_size=28)
    assert back.config.vision_config.num_positions == 5
