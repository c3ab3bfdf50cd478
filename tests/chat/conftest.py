"""A tiny checkpoint with random weights, and a picture to talk about."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from cogvlm_sft.checkpoint.load import build_model, build_processor, save_checkpoint
from cogvlm_sft.demo.tokenizer import train_tokenizer

CONFIG = {
    "vocab_size": 330,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    folder = train_tokenizer(["What digit is this? 7 "] * 20, root / "tokenizer", vocabulary=330)
    torch.manual_seed(0)
    model = build_model(CONFIG)
    with torch.no_grad():  # pieces of words only: single bytes of a random model are no text
        model.lm_head.weight[:259] = 0
    return save_checkpoint(model, build_processor(model.config, folder), root / "model")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    return tmp_path / "red.png"
