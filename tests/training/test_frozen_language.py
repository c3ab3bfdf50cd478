"""The paper's central claim: a visual expert is trained and text alone is answered as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cogvlm_sft.checkpoint.load import build_model, build_processor, load_model, save_checkpoint
from cogvlm_sft.demo.smollm2 import check_same_text
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.recipe import Recipe, load_recipe
from cogvlm_sft.training.run import train

FROZEN = {"tune__language": {"mode": "frozen"}, "tune__embeddings": {"mode": "frozen"}}


def outputs(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a text and of a picture with the same text."""
    model = load_model(folder).eval()
    block = model.config.num_image_tokens
    text = torch.tensor([[1, 5, 9, 40, 77, 12, 3]])
    ids = torch.cat((text[:, :1], torch.zeros(1, block, dtype=torch.long), text[:, 1:]), dim=1)
    types = torch.zeros_like(ids)
    types[:, 1 : 1 + block] = 1
    torch.manual_seed(3)
    with torch.no_grad():
        seen = model(input_ids=ids, token_type_ids=types, pixel_values=torch.randn(1, 3, 28, 28))
        return model(input_ids=text).logits, seen.logits


def test_text_alone_is_answered_as_before(
    make_recipe: Callable[..., Recipe], world: Path, tiny: dict, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build_model(tiny)
    processor = build_processor(model.config, world / "tokenizer")
    base = save_checkpoint(model, processor, tmp_path / "base")
    recipe = make_recipe(model__config=None, model__checkpoint=base, train__iterations=3, **FROZEN)
    output = train(recipe).output
    (text, picture), (text_after, picture_after) = outputs(base), outputs(output)
    assert torch.equal(text, text_after)
    assert not torch.allclose(picture, picture_after, atol=1e-3)


def test_the_smollm2_recipes_freeze_the_language_model() -> None:
    for stage in ("pretrain", "align"):
        tune = load_recipe(f"smollm2/{stage}").tune
        assert tune.language.mode == tune.embeddings.mode == "frozen"
        assert tune.visual_expert.mode == tune.adapter.mode == "full"


def test_changed_text_is_an_error() -> None:
    before = {"Who?": (b"12", "You."), "What?": (b"34", "This.")}
    check_same_text(before, dict(before), Path("runs/same"))
    with pytest.raises(CheckpointError, match=r"runs/other: the answer to 'What\?'"):
        check_same_text(before, {**before, "What?": (b"35", "This.")}, Path("runs/other"))
