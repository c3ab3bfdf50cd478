"""A base checkpoint of random weights, a few pictures to train on, and one batch of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cogvlm_sft.checkpoint.load import build_model, build_processor, save_checkpoint
from cogvlm_sft.demo.tokenizer import train_tokenizer
from cogvlm_sft.recipe import Recipe, recipe_from_dict

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (128,) * 3}
CONFIG: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "num_hidden_layers": 2,
        "image_size": 28,
        "patch_size": 14,
        "num_positions": 5,
    },
}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base/` (a whole checkpoint), `images/` and `train.jsonl`."""
    root = tmp_path_factory.mktemp("world")
    (root / "images").mkdir()
    rows = []
    for number in range(16):
        name = list(COLOURS)[number % 4]
        Image.new("RGB", (28, 28), COLOURS[name]).save(root / "images" / f"{number:02d}.png")
        rows.append(
            {
                "id": f"colours:{number}",
                "source": "colours",
                "style": "chat",
                "images": [f"{number:02d}.png"],
                "messages": [
                    {"role": "user", "content": "<image>\nWhat colour is it?"},
                    {"role": "assistant", "content": name},
                ],
                "meta": {},
            }
        )
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["Question: What colour is it? Answer: It is a", *COLOURS] * 20
    tokenizer = train_tokenizer(texts, root / "tokenizer", vocabulary=320)
    torch.manual_seed(0)
    model = build_model(CONFIG)
    save_checkpoint(model, build_processor(model.config, tokenizer), root / "base")
    return root


@pytest.fixture(scope="session")
def base(world: Path) -> Path:
    return world / "base"


@pytest.fixture
def make_recipe(world: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe from the base into `tmp_path/run`; `section__key=value` replaces values."""

    def make(**changes: Any) -> Recipe:
        frozen = {"mode": "frozen"}
        tree: dict[str, Any] = {
            "model": {"checkpoint": str(world / "base"), "dtype": "float32"},
            "data": {
                "train": [{"path": str(world / "train.jsonl")}],
                "image_root": str(world / "images"),
            },
            "tune": {
                "language": frozen,
                "visual_expert": {"mode": "lora", "rank": 4},
                "adapter": {"mode": "full"},
                "vision_tower": frozen,
                "embeddings": frozen,
            },
            "train": {
                "output": str(tmp_path / "run"),
                "iterations": 6,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "learning_rate": 1e-2,
                "save_every": 100,
                "log_every": 1,
            },
        }
        for dotted, value in changes.items():
            section, _, key = dotted.partition("__")
            tree[section][key] = str(value) if hasattr(value, "__fspath__") else value
        return recipe_from_dict(tree, source="tiny.yaml")

    return make


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """A row with a picture and one of text only, padded; (2, 17).

    Picture positions are supervised too: otherwise what the visual expert of the last layer makes
    of them is read by nobody, and learns nothing.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 320, (2, 17), generator=generator)
    types = torch.zeros_like(ids)
    types[0, 1:7] = 1
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {
        "input_ids": ids,
        "token_type_ids": types,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": torch.randn(1, 3, 28, 28, generator=generator),
    }
