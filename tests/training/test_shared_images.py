"""Runs with shared pictures: the same losses as separate rows, exact resume, the budget checked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cogvlm_sft import CogVLMForCausalLM, Recipe, RecipeError, train
from cogvlm_sft.data.collator import CogVLMCollator
from cogvlm_sft.training import run, snapshots
from cogvlm_sft.training.telemetry import read_metrics

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """26 conversations: four pictures with 1, 4, 7 and 10 of them, and four about no picture."""
    root = tmp_path / "album"
    root.mkdir()
    rows = []
    for number, count in enumerate((1, 4, 7, 10)):
        name, colour = f"{number}.png", (60 * number, 90, 200 - 50 * number)
        Image.new("RGB", (30, 20), colour).save(root / name)
        rows += [(name, "What colour is it?", "red " * (ask + 1)) for ask in range(count)]
    rows += [(None, "Is it bright?", f"It is grey{' and blue' * n}.") for n in range(4)]
    lines = []
    for index, (picture, question, answer) in enumerate(rows):
        asked = question if picture is None else f"<image>\n{question}"
        record = {
            "id": f"album:{index}",
            "source": "album",
            "style": "text" if picture is None else "chat",
            "images": [] if picture is None else [picture],
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answer.strip()},
            ],
            "meta": {},
        }
        lines.append(json.dumps(record))
    (root / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture
def make(make_recipe: MakeRecipe, album: Path) -> MakeRecipe:
    def build(**changes: object) -> Recipe:
        options = {
            "data__train": [{"path": str(album / "train.jsonl")}],
            "data__image_root": album,
            "data__share_images": True,
            "data__token_budget": 400,
            "train__global_batch_size": 8,
            **changes,
        }
        return make_recipe(**options)

    return build


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl") if "loss" in row]


def test_losses_are_those_of_separate_rows(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses and weights from fewer pictures, which no setting of TRL's gives."""
    pictures: list[int] = []
    forward = CogVLMForCausalLM.forward

    def watch(self: CogVLMForCausalLM, *args: Any, **kwargs: Any) -> Any:
        pixels = kwargs.get("pixel_values")
        pictures.append(0 if pixels is None else len(pixels))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CogVLMForCausalLM, "forward", watch)
    packed = train(make())
    seen = len(pictures)
    monkeypatch.setattr(run, "SharedImageCollator", CogVLMCollator)
    separate = train(make(train__output=tmp_path / "separate"))
    assert sum(pictures[:seen]) < sum(pictures[seen:]) / 2
    assert losses(packed.output) == pytest.approx(losses(separate.output), rel=1e-5)
    left, right = (load_file(r.output / "model.safetensors") for r in (packed, separate))
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=1e-4, rtol=1e-3)


def test_resume_is_bit_exact(
    make: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of a pass (26 conversations, 8 a step)."""
    straight = train(make(train__output=tmp_path / "straight", train__save_every=2))
    stopped = make(train__output=tmp_path / "stopped", train__save_every=2)
    train(stopped)
    for step in (4, 6):
        folder = snapshots.snapshot_folder(stopped.train.output, step)
        (folder / snapshots.MANIFEST).unlink()
    for name in ("model.safetensors", "config.json"):
        (stopped.train.output / name).unlink()
    resumed = train(stopped)
    assert resumed.steps == 6
    left, right = (load_file(r.output / "model.safetensors") for r in (straight, resumed))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert losses(straight.output) == losses(resumed.output)


def test_what_a_step_holds_is_printed(make: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    train(make(train__iterations=1, train__warmup_iterations=0))
    assert "a step holds 8 conversations about" in capsys.readouterr().out


def test_held_out_figures_are_of_rows(make: MakeRecipe, album: Path) -> None:
    result = train(make(data__validation=album / "train.jsonl", train__iterations=1,
                        train__warmup_iterations=0))  # fmt: skip
    assert result.held_out_loss is not None


def test_each_picture_is_decoded_once_a_micro_batch(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cogvlm_sft.data import mixture

    read: list[str] = []
    original = mixture.read_picture

    def watch(path: Path, *rest: Any) -> Image.Image:
        read.append(path.name)
        return original(path, *rest)

    monkeypatch.setattr(mixture, "read_picture", watch)
    train(make(train__iterations=1, train__warmup_iterations=0, train__micro_batch_size=8))
    assert len(read) == len(set(read))


def test_a_budget_too_small_is_named_before_training(make: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is 20, but step 3 needs micro-batches of 155"):
        train(make(data__token_budget=20))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__token_budget": None}, "data.token_budget is null"),
        ({"data__share_images": False}, "data.share_images is false"),
        ({"data__length_window": 3}, "data.length_window is 3"),
    ],
)
def test_keys_that_go_together(make: MakeRecipe, changes: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make(**changes)
