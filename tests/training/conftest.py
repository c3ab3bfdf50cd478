"""A world small enough to train in a second: tokenizer, pictures, conversations, a recipe."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cogvlm_sft.recipe import Recipe, recipe_from_dict

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (128,) * 3}
TINY = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "num_hidden_layers": 2,
        "image_size": 28,
        "patch_size": 14,
        "num_positions": 5,
    },
}


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Fields of a model of 0.25M parameters that sees 28 px pictures."""
    return copy.deepcopy(TINY)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer/`, `images/`, and `train.jsonl` of 22 conversations."""
    root = tmp_path_factory.mktemp("world")
    questions = ["What colour is it?", "Describe the picture.", "Is it bright, and which shade?"]
    _write_tokenizer(root / "tokenizer", [*questions, *COLOURS, "Question: Answer: It is a."])
    (root / "images").mkdir()
    rows = []
    for number in range(22):
        name = list(COLOURS)[number % 4]
        side = 20 + number
        Image.new("RGB", (side, 28), COLOURS[name]).save(root / "images" / f"{number:02d}.png")
        answer = name if number % 3 else f"It is {name}, a shade of {name}."
        rows.append(
            {
                "id": f"colours:{number}",
                "source": "colours",
                "style": "chat",
                "images": [f"{number:02d}.png"],
                "messages": [
                    {"role": "user", "content": f"<image>\n{questions[number % 3]}"},
                    {"role": "assistant", "content": answer},
                ],
                "meta": {},
            }
        )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "train.jsonl").write_text(lines, encoding="utf-8")
    return root


def _write_tokenizer(folder: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    ).save_pretrained(folder)


@pytest.fixture
def make_recipe(world: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A from-scratch recipe into `tmp_path/run`; keyword `section__key=value` replaces values."""

    def make(**changes: Any) -> Recipe:
        tree: dict[str, Any] = {
            "model": {"config": TINY, "tokenizer": str(world / "tokenizer"), "dtype": "float32"},
            "data": {
                "train": [{"path": str(world / "train.jsonl")}],
                "image_root": str(world / "images"),
            },
            "tune": {},
            "train": {
                "output": str(tmp_path / "run"),
                "iterations": 6,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "learning_rate": 1e-3,
                "warmup_iterations": 2,
                "save_every": 100,
                "log_every": 1,
            },
        }
        for dotted, value in changes.items():
            section, _, key = dotted.partition("__")
            if value is not None and hasattr(value, "__fspath__"):
                value = str(value)
            tree.setdefault(section, {})[key] = value
        return recipe_from_dict(tree, source="tiny.yaml")

    return make
