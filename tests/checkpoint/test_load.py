"""Folders that are read: the released code's figures from shards, and mistakes named by file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cogvlm_sft.checkpoint.layout import entries, with_released_default
from cogvlm_sft.checkpoint.load import (
    build_processor,
    expected_shapes,
    load_config,
    load_model,
    load_processor,
    make_config,
)
from cogvlm_sft.checkpoint.positions import POSITION_EMBEDDING, interpolate_positions
from cogvlm_sft.checkpoint.weights import INDEX
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.model import CogVLMConfig
from tests.checkpoint.conftest import GOLDEN, VISION, assert_same, tensors_of

CASES = ("single_image", "batch2_left", "two_images_interleaved", "image_last")


def released(source: Path, out: Path, shards: int = 3) -> Path:
    """As the released repositories are: shards with an index, no model_type, foreign code."""
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    share = -(-len(names) // shards)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number * share : (number + 1) * share]}
        save_file(part, out / file)
        weight_map |= dict.fromkeys(part, file)
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )
    config = json.loads((source / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    config |= {
        "_name_or_path": "cogvlm-chat-v1.1",
        "auto_map": {"AutoConfig": "configuration_cogvlm.CogVLMConfig"},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.35.0",
        "template_version": "base",
    }
    (out / "config.json").write_text(json.dumps(config))
    for name in ("configuration_cogvlm.py", "modeling_cogvlm.py"):
        (out / name).write_text("raise SystemExit('remote code was run')")
    return out


@pytest.mark.parametrize("generation", ["golden", "golden_v2"])
def test_released_code_s_figures_from_files(
    generation: str, tokenizer: Path, tmp_path: Path
) -> None:
    folder = released(GOLDEN / generation, tmp_path / "cogvlm-chat-hf")
    model = load_model(folder)
    cases = load_file(GOLDEN / generation / "cases.safetensors")
    for case in CASES:
        keys = ("input_ids", "token_type_ids", "attention_mask", "pixel_values")
        inputs = {key: cases[f"in/{case}/{key}"] for key in keys}
        inputs = {k: v.long() if v.dtype == torch.int16 else v for k, v in inputs.items()}
        with torch.no_grad():
            logits = model(**inputs).logits[..., ::8]
        real = inputs["attention_mask"].bool()
        truth = cases[f"out/{case}/logits"]
        torch.testing.assert_close(logits[real], truth[real], atol=1e-4, rtol=0)
    processor = load_processor(folder, tokenizer)
    assert processor.style == model.config.template_version == "base"
    assert processor.num_image_tokens == model.config.num_image_tokens
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_processor(folder)


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., Path]:
    """A released folder in which `change` damaged something."""

    def make(change: Callable[[Path], Any]) -> Path:
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        folder = released(GOLDEN / "golden", tmp_path / "broken")
        change(folder)
        return folder

    return make


def second_shard(folder: Path) -> Path:
    return folder / "model-00002-of-00003.safetensors"


def truncate(folder: Path) -> None:
    file = second_shard(folder)
    file.write_bytes(file.read_bytes()[:-100])


def reshape(folder: Path) -> None:
    tensors = load_file(second_shard(folder))
    name = "model.layers.1.self_attn.vision_expert_dense.weight"
    tensors[name] = tensors[name][:-2].clone()
    save_file(tensors, second_shard(folder))


def whole_numbers(folder: Path) -> None:
    tensors = load_file(second_shard(folder))
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].long()}, second_shard(folder))


def move_out(folder: Path) -> None:
    """An index that names a file of somebody else's folder."""
    second_shard(folder).replace(folder.parent / second_shard(folder).name)
    index = json.loads((folder / INDEX).read_text())
    for name, file in index["weight_map"].items():
        if file == second_shard(folder).name:
            index["weight_map"][name] = f"../{file}"
    (folder / INDEX).write_text(json.dumps(index))


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            (config["vision_config"] if key == "image_siz" else config)[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda folder: second_shard(folder).unlink(), ["broken", "model-00002-of-00003"]),
        (truncate, ["model-00002-of-00003.safetensors", "damaged or incomplete"]),
        (reshape, ["1.self_attn.vision_expert_dense.weight: (62, 64) in model-00002-of-00003"]),
        (edit(vision_expert_size=3), ["config.json", "unknown field 'vision_expert_size'"]),
        (edit(image_siz=3), ["config.json: vision_config", "'image_siz'", "'image_size'"]),
        (edit(vocab_size=300), ["lm_head.weight: (320, 64)", "(300, 64) by config.json"]),
        (edit(hidden_size="wide"), ["config.json", "hidden_size"]),
        (edit(num_hidden_layers=3), ["missing (model.layers.2.input_layernorm.weight"]),
        (edit(num_hidden_layers=1), ["unexpected", "model.layers.1.input_layernorm.weight"]),
        (edit(num_attention_heads=0), ["config.json", "num_attention_heads is 0, expected"]),
        (edit(hidden_act="sillu"), ["config.json", "hidden_act is 'sillu'"]),
        (edit(rope_theta="big"), ["config.json", "rope_theta is 'big', expected a number above 0"]),
        (edit(pad_token_id=320), ["config.json", "pad_token_id is 320, expected 0 to 319"]),
        (edit(torch_dtype="float99"), ["config.json", "float99"]),
        (edit(tie_word_embeddings=True), ["config.json: tie_word_embeddings is true"]),
        (lambda f: (f / "generation_config.json").write_text("[]"), ["generation_config.json"]),
        (whole_numbers, ["model-00002-of-00003", "is of dtype I64, expected F64 or F32"]),
        (move_out, ["index.json: names '../model-00002-of-00003.safetensors', expected plain"]),
        (lambda f: (f / INDEX).write_text("[]"), ["index.json: not an index of weights"]),
        (lambda f: (f / INDEX).write_bytes(b"\xff"), ["index.json: not an index of weights"]),
    ],
    ids=["missing shard", "truncated shard", "wrong shape", "unknown field", "unknown vision field",
         "vocabulary", "type", "layer missing", "layer too many", "no heads", "activation", "rope",
         "pad", "torch dtype", "tied", "generation config", "weights of another kind",
         "index leaves the folder", "index of another shape", "index of other bytes"],
)  # fmt: skip
def test_mistakes_name_file_and_key(
    broken: Callable[..., Path], change: Callable[[Path], Any], named: list[str]
) -> None:
    with pytest.raises(CheckpointError) as raised:
        load_model(broken(change))
    for words in named:
        assert words in str(raised.value)


def test_a_tokenizer_that_is_too_large(broken: Callable[..., Path], tokenizer: Path) -> None:
    folder = broken(edit(vocab_size=300))
    with pytest.raises(CheckpointError, match=r"320 tokens, the model's vocab_size is 300"):
        load_processor(folder, tokenizer)
    assert str(load_config(folder).vocab_size) == "300"


def test_a_tied_head_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"model\.config: tie_word_embeddings is true"):
        make_config({"tie_word_embeddings": True})


@pytest.mark.parametrize("place", ["tokenizer_config.json", "processor_config.json"])
def test_python_code_of_a_folder_is_not_run_nor_asked_about(
    checkpoint: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "foreign"
    shutil.copytree(checkpoint, folder)
    (folder / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    settings = json.loads((folder / place).read_text())
    settings["auto_map"] = {
        "AutoTokenizer": ["foreign.Own", "foreign.Own"],
        "AutoProcessor": "foreign.Own",
        "AutoImageProcessor": "foreign.Own",
    }
    settings["tokenizer_class"] = "Own"
    (folder / place).write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # a person who says yes to everything
    if place == "tokenizer_config.json":
        with pytest.raises(CheckpointError, match="wants Python code of that folder"):
            load_processor(folder)
        with pytest.raises(CheckpointError, match="wants Python code of that folder"):
            load_processor(checkpoint, folder)
    else:
        assert load_processor(folder).tokenizer("Hello")
    load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_tokenizer_is_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="the processor cannot be loaded"):
        load_processor(folder)
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        load_processor(checkpoint, folder)


RELEASED_COGVLM2 = {  # its config.json: no model_type, no number of key/value heads
    "architectures": ["CogVLMForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_cogvlm.CogVLMConfig",
                 "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM"},
    "vision_config": {"dropout_prob": 0.0, "hidden_act": "gelu", "in_channels": 3,
                      "num_hidden_layers": 63, "hidden_size": 1792, "patch_size": 14,
                      "num_heads": 16, "intermediate_size": 15360, "layer_norm_eps": 1e-06,
                      "num_positions": 9217, "image_size": 1344},
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "template_version": "chat",
    "initializer_range": 0.02, "bos_token_id": 128000, "eos_token_id": [128001, 128009],
    "pad_token_id": 128002, "vocab_size": 128256, "num_hidden_layers": 32, "hidden_act": "silu",
    "use_cache": True,
}  # fmt: skip


@pytest.mark.parametrize("told", [{}, {"num_key_value_heads": 8, "model_type": "cogvlm2"}])
def test_the_released_cogvlm2_is_one(tmp_path: Path, told: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_COGVLM2 | told))
    config = load_config(tmp_path)
    assert config.is_cogvlm2 and config.num_key_value_heads == 8 and config.rope_base == 500000
    assert config.num_image_tokens == 2306
    shapes = expected_shapes(config)
    numbers = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert sum(n for name, n in numbers.items() if "inv_freq" not in name) == 19_503_105_280
    # What `checkpoint inspect` goes by, and what transformers' own way of loading does.
    raw = with_released_default(RELEASED_COGVLM2 | told)
    assert {entry.name: entry.shape for entry in entries(raw)}.items() <= shapes.items()
    assert CogVLMConfig.from_pretrained(tmp_path).num_multi_query_heads == 8


def test_positions_interpolated() -> None:
    torch.manual_seed(0)
    embedding = torch.randn(1 + 16 * 16, 8)
    wide = interpolate_positions(embedding, 35)
    assert wide.shape == (1226, 8) and torch.equal(wide[0], embedding[0])
    planes = embedding[1:].T.reshape(1, 8, 16, 16)
    expected = torch.nn.functional.interpolate(planes, (35, 35), mode="bicubic")
    assert torch.equal(wide[1:], expected[0].reshape(8, -1).T)
    assert interpolate_positions(embedding, 16) is embedding
    flat = torch.ones(1 + 16, 3)  # a constant stays what it is, at any size
    torch.testing.assert_close(interpolate_positions(flat, 7), torch.ones(50, 3))
    with pytest.raises(CheckpointError, match="11 rows"):
        interpolate_positions(torch.ones(11, 3), 4)


@pytest.mark.parametrize("side", [28, 56, 98, 140])
def test_another_picture_size(checkpoint: Path, tmp_path: Path, side: int) -> None:
    """Any multiple of the patch: only the positions change, and the result is a checkpoint."""
    model = load_model(checkpoint, image_size=side)
    processor = load_processor(checkpoint, image_size=side)
    inputs = processor([], "Hello", style="text", return_tensors="pt")
    picture = torch.randn(1, 3, side, side)
    assert (
        model.model.vision(picture).shape[1] == processor.num_image_tokens == (side // 14) ** 2 + 2
    )
    model.save_pretrained(tmp_path / "resized")
    again, before = tensors_of(tmp_path / "resized"), tensors_of(checkpoint)
    expected = {
        **before,
        POSITION_EMBEDDING: interpolate_positions(before[POSITION_EMBEDDING], side // 14),
    }
    assert_same(again, expected)
    assert load_model(tmp_path / "resized").config.vision_config.image_size == side
    with torch.no_grad():  # text does not care
        torch.testing.assert_close(
            model(**inputs).logits, load_model(checkpoint)(**inputs).logits, atol=0, rtol=0
        )


def test_a_picture_size_that_does_not_fit(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="image_size is 100, expected a multiple of 14"):
        load_model(checkpoint, image_size=100)
    with pytest.raises(CheckpointError, match=r"multiple of 28 .* halved by the convolution"):
        load_model(GOLDEN / "golden_v2", image_size=70)


def test_llama3_s_tokenizer_takes_the_configured_pad(tmp_path: Path) -> None:
    """It names none; CogVLM2's config.json takes a reserved token, and placeholders hold it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["What is it?"], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[0], eos_token=special[1]
    ).save_pretrained(tmp_path)
    fields = {"bos_token_id": 0, "eos_token_id": [1, 5], "pad_token_id": 2, "vocab_size": 300}
    config = make_config({"num_multi_query_heads": 8, **fields, "vision_config": VISION})
    processor = build_processor(config, tmp_path)
    assert processor.tokenizer.pad_token_id == 2
    row = processor.encode_prompt("What is it?")
    kinds = zip(row["input_ids"], row["token_type_ids"], strict=True)
    assert [token for token, kind in kinds if kind] == [2] * config.num_image_tokens
