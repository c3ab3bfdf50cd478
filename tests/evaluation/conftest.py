"""A tiny CogVLM with random weights and a tokenizer trained on a few sentences."""

from pathlib import Path

import pytest
import torch

from cogvlm_sft.checkpoint.load import build_model, build_processor, save_checkpoint
from cogvlm_sft.demo.tokenizer import train_tokenizer
from cogvlm_sft.model import CogVLMForCausalLM, CogVLMProcessor

CONFIG = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "num_positions": 5,
    },
}
TEXTS = ["Question: What digit is this? Answer: 7", "Where is the red square? [[000,250,500,999]]"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[CogVLMForCausalLM, CogVLMProcessor]:
    folder = train_tokenizer(TEXTS * 20, tmp_path_factory.mktemp("tokenizer"), vocabulary=320)
    torch.manual_seed(0)
    model = build_model(CONFIG)
    return model, build_processor(model.config, folder)


@pytest.fixture(scope="session")
def checkpoint(
    tiny: tuple[CogVLMForCausalLM, CogVLMProcessor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return save_checkpoint(*tiny, tmp_path_factory.mktemp("checkpoint") / "model")
