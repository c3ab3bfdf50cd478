"""Tiny parts on the disk: a tokenizer, Llamas, towers, and a checkpoint with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from cogvlm_sft.checkpoint.load import build_model, build_processor, save_checkpoint
from cogvlm_sft.demo.tokenizer import train_tokenizer

TEXTS = ["Question: What digit is this? Answer: 7", "Where is the red square? [[000,250,500,999]]"]
GOLDEN = Path(__file__).parent.parent / "model"  # golden/ and golden_v2/: the released code's
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 56,
    "patch_size": 14,
    "num_positions": 17,
}
CONFIG: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "vision_config": VISION,
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, whatever its shards."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece tokenizer folder of 320 pieces."""
    return train_tokenizer(TEXTS * 20, tmp_path_factory.mktemp("tokenizer"), vocabulary=320)


@pytest.fixture(scope="session")
def checkpoint(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CogVLM with random weights, as a run writes it."""
    torch.manual_seed(0)
    model = build_model(CONFIG)
    processor = build_processor(model.config, tokenizer)
    return save_checkpoint(model, processor, tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def make_llama(tokenizer: Path, tmp_path: Path) -> Callable[..., Path]:
    """A Llama folder with random weights; keyword arguments change its configuration."""

    def make(name: str = "llama", **changes: Any) -> Path:
        fields = {key: value for key, value in CONFIG.items() if key != "vision_config"}
        torch.manual_seed(1)
        llama = LlamaForCausalLM(LlamaConfig(**{**fields, "pad_token_id": 0, **changes}))
        llama.save_pretrained(tmp_path / name)
        for file in tokenizer.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        return tmp_path / name

    return make
