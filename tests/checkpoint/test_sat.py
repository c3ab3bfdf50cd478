"""SAT checkpoints, written here in SAT's layout from a tiny CogVLM, come back equal."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogvlm_sft.checkpoint.load import load_model, load_processor
from cogvlm_sft.checkpoint.sat import convert_sat
from cogvlm_sft.cli import main
from cogvlm_sft.errors import CheckpointError
from tests.checkpoint.conftest import CONFIG, VISION, assert_same, tensors_of

EVA = "mixins.eva.vit_model."


def sat_name(name: str) -> str:
    """SAT's name of a released parameter, module by module as the authors' code builds them."""
    layer = next((part for part in name.split(".") if part.isdigit()), "")
    kind = name.rsplit(".", 1)[-1]
    vision = f"model.vision.transformer.layers.{layer}."
    if name.startswith(vision):
        inner = name.removeprefix(vision).replace("fc1", "dense_h_to_4h")
        return f"{EVA}transformer.layers.{layer}.{inner.replace('fc2', 'dense_4h_to_h')}"
    plain = {
        "model.embed_tokens.weight": "transformer.word_embeddings.weight",
        "model.norm.weight": "transformer.final_layernorm.weight",
        "lm_head.weight": "mixins.lm.lm_head.weight",
        "model.vision.boi": "mixins.eva.boi",
        "model.vision.eoi": "mixins.eva.eoi",
        "model.vision.patch_embedding.cls_embedding": f"{EVA}transformer.word_embeddings.weight",
        "model.vision.patch_embedding.position_embedding.weight": (
            f"{EVA}transformer.position_embeddings.weight"
        ),
        "model.vision.patch_embedding.proj.weight": f"{EVA}mixins.patch_embedding.proj.weight",
        "model.vision.patch_embedding.proj.bias": f"{EVA}mixins.patch_embedding.proj.bias",
    }
    if name in plain:
        return plain[name]
    if "linear_proj" in name:
        return name.replace("model.vision.", "mixins.eva.")
    inner = name.removeprefix(f"model.layers.{layer}.").removesuffix(f".{kind}")
    mixins = {
        "self_attn.vision_expert_query_key_value": "rotary.vision_query_key_value_list",
        "self_attn.vision_expert_dense": "rotary.vision_dense_list",
        "mlp.language_mlp.gate_proj": "mlp.gate_proj",
        "mlp.vision_mlp.gate_proj": "mlp.vision_gate_proj",
        "mlp.vision_mlp.up_proj": "mlp.vision_dense_h_to_4h_list",
        "mlp.vision_mlp.down_proj": "mlp.vision_dense_4h_to_h_list",
    }
    if inner in mixins:
        return f"mixins.{mixins[inner]}.{layer}.{kind}"
    inner = inner.replace("self_attn.language_expert_", "attention.")
    inner = inner.replace("mlp.language_mlp.up_proj", "mlp.dense_h_to_4h")
    inner = inner.replace("mlp.language_mlp.down_proj", "mlp.dense_4h_to_h")
    return f"transformer.layers.{layer}.{inner}.{kind}"


def split(name: str, tensor: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """What each model-parallel rank holds: SAT's column, strided and row parallel linears."""
    plain = "linear_proj" in name or "layernorm" in name or "patch_embedding" in name
    row = name.endswith(("dense.weight", "dense_4h_to_h.weight")) or "_4h_to_h_list" in name
    row = row or "vision_dense_list" in name
    if ranks == 1 or plain or name.endswith(("boi", "eoi", "dense.bias", "4h_to_h.bias")):
        return [tensor] * ranks
    if name in (f"{EVA}transformer.word_embeddings.weight", "transformer.final_layernorm.weight"):
        return [tensor] * ranks
    if "position_embeddings" in name:
        return [tensor] * ranks
    if row:
        return [piece.clone() for piece in tensor.chunk(ranks, dim=1)]
    if "query_key_value" in name:
        thirds = [third.chunk(ranks) for third in tensor.chunk(3)]
        return [torch.cat([third[rank] for third in thirds]) for rank in range(ranks)]
    return [piece.clone() for piece in tensor.chunk(ranks)]


def write_sat(checkpoint: Path, out: Path, *, ranks: int = 1, lora: int = 0) -> Path:
    """A training checkpoint as SAT saves it; with `lora`, attention is split off as `original`."""
    states: list[dict[str, Any]] = [{} for _ in range(ranks)]
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors_of(checkpoint).items():
        if name.endswith("inv_freq"):
            for state in states:
                state["mixins.rotary.rotary_emb.inv_freq"] = tensor
            continue
        theirs = sat_name(name)
        for state, piece in zip(states, split(theirs, tensor, ranks), strict=True):
            if not (lora and ".attention." in theirs):
                state[theirs] = piece
                continue
            module, kind = theirs.rsplit(".", 1)
            if kind == "weight":
                parts = 3 if "query_key_value" in theirs else 1
                for index in range(parts):
                    first = torch.randn(lora, piece.shape[1], generator=generator)
                    second = torch.randn(piece.shape[0] // parts, lora, generator=generator)
                    rows = slice(index * second.shape[0], (index + 1) * second.shape[0])
                    piece = piece.clone()
                    piece[rows] -= second @ first / lora
                    state[f"{module}.matrix_A.{index}"] = first
                    state[f"{module}.matrix_B.{index}"] = second
            state[f"{module}.original.{kind}"] = piece
    step = out / "800"
    step.mkdir(parents=True)
    for rank, state in enumerate(states):
        torch.save(
            {
                "module": state,
                "iteration": 800,
                "args": argparse.Namespace(bf16=True),
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
            },
            step / f"mp_rank_{rank:02}_model_states.pt",
        )
    (out / "latest").write_text("800")
    described = {
        "num_attention_heads": CONFIG["num_attention_heads"],
        "model_parallel_size": ranks,
        "eva_args": {"num_attention_heads": VISION["num_heads"]},
    }
    (out / "model_config.json").write_text(json.dumps(described))
    return out


@pytest.mark.parametrize("ranks", [1, 2])
def test_comes_back_equal(checkpoint: Path, tmp_path: Path, ranks: int) -> None:
    sat = write_sat(checkpoint, tmp_path / "sat", ranks=ranks)
    assert_same(tensors_of(checkpoint), tensors_of(convert_sat(sat, tmp_path / "out")))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, value in CONFIG.items():
        if key == "vision_config":
            assert {k: config[key][k] for k in VISION} == VISION
        elif key not in ("max_position_embeddings", "initializer_range"):
            assert config[key] == value, key


@pytest.mark.parametrize("ranks", [1, 2])
def test_lora_is_merged(checkpoint: Path, tmp_path: Path, ranks: int) -> None:
    sat = write_sat(checkpoint, tmp_path / "sat", ranks=ranks, lora=3)
    merged, truth = tensors_of(convert_sat(sat, tmp_path / "out")), tensors_of(checkpoint)
    assert merged.keys() == truth.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-5, rtol=0)


def test_command_with_tokenizer(
    checkpoint: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sat, out = write_sat(checkpoint, tmp_path / "sat"), tmp_path / "out"
    arguments = ["checkpoint", "convert", str(sat / "800"), "--out", str(out), "--tokenizer",
                 str(tokenizer), "--template", "base", "--dtype", "bfloat16"]  # fmt: skip
    assert main(arguments) == 0
    assert str(out) in capsys.readouterr().out
    model, processor = load_model(out), load_processor(out)
    assert model.config.template_version == processor.style == "base"
    assert tensors_of(out)["lm_head.weight"].dtype == torch.bfloat16


def test_mistakes_name_the_file_and_the_key(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fails(path: Path, *named: str) -> None:
        with pytest.raises(CheckpointError) as raised:
            convert_sat(path, out)
        for words in named:
            assert words in str(raised.value)
        assert not out.exists() and not list(tmp_path.glob(".*"))

    def changed(name: str, **changes: Any) -> Path:
        sat = write_sat(checkpoint, tmp_path / name)
        file = sat / "800" / "mp_rank_00_model_states.pt"
        content = torch.load(file, weights_only=False)
        for key, value in changes.items():
            if value is None:
                del content["module"][key.replace("__", ".")]
            else:
                content["module"][key.replace("__", ".")] = value
        torch.save(content, file)
        return sat

    fails(tmp_path / "nowhere", "nowhere does not exist")
    fails(checkpoint, "mp_rank_NN_model_states.pt")
    two = write_sat(checkpoint, tmp_path / "two", ranks=2)
    (two / "800" / "mp_rank_01_model_states.pt").unlink()
    fails(two, "1 of 2 model-parallel ranks are missing", "mp_rank_01")
    cut = write_sat(checkpoint, tmp_path / "cut") / "800" / "mp_rank_00_model_states.pt"
    cut.write_bytes(cut.read_bytes()[:-5000])
    fails(tmp_path / "cut", "mp_rank_00_model_states.pt", "damaged")
    fails(changed("odd", mixins__odd__weight=torch.ones(2)), "mixins.odd.weight is no tensor of a")
    fails(changed("less", mixins__eva__boi=None), "1 missing (model.vision.boi)")
    narrow = {"mixins__mlp__vision_gate_proj__1__weight": torch.ones(40, 32)}
    fails(changed("narrow", **narrow), "vision_mlp.gate_proj.weight: (40, 32)", "(48, 32)")
    four = {"transformer__layers__0__attention__dense__weight": torch.ones(4, dtype=torch.uint8)}
    fails(changed("four", **four), "attention.dense.weight is 4-bit")
    whole = {"transformer__final_layernorm__weight": torch.ones(32, dtype=torch.int64)}
    fails(changed("whole", **whole), "final_layernorm.weight is of torch.int64, expected floats")
    single = {"transformer__final_layernorm__weight": torch.tensor(1.0)}
    fails(changed("single", **single), "a single number where a matrix or vector belongs")
    described = write_sat(checkpoint, tmp_path / "described")
    for text, said in (
        ("[]", "cannot be read as SAT's JSON"),
        ('{"model_parallel_size": 1000000000}', "model_parallel_size is 1000000000, expected 1 to"),
        ('{"num_attention_heads": "4"}', "num_attention_heads is '4', expected 1 to"),
    ):
        (described / "model_config.json").write_text(text)
        fails(described, "model_config.json", said)
    torch.save({"weights": {}}, tmp_path / "mp_rank_00_model_states.pt")
    fails(tmp_path, "no 'module' in it")


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"module": {}, "extra": Payload()}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"could run code \((builtins\.)?print\)") as raised:
        convert_sat(tmp_path, tmp_path / "out")
    assert "weights_only" not in str(raised.value)  # torch's own advice is to load it all the same
    assert "run" not in capsys.readouterr().out
