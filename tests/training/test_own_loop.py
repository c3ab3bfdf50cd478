"""The Python blocks of docs/training.md, run as they stand there."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cogvlm_sft import Recipe, train
from cogvlm_sft.checkpoint.load import load_config

DOCS = Path(__file__).parents[2] / "docs" / "training.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.M)


@pytest.fixture
def demo_folder(
    make_recipe: Callable[..., Recipe],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The paths of the examples, filled with the tiny world."""
    demo = tmp_path / "runs" / "demo"
    build = demo / "data" / "chat"
    build.mkdir(parents=True)
    shutil.copytree(world / "images", demo / "images")
    shutil.copy(world / "train.jsonl", build / "conversations-00000-of-00001.jsonl")
    train(make_recipe(train__output=demo / "pretrain", train__iterations=2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_api(demo_folder: Path) -> None:
    names: dict[str, object] = {}
    exec(compile(BLOCKS[0], str(DOCS), "exec"), names)
    result = names["result"]
    assert result.steps == 3  # type: ignore[attr-defined]
    load_config(demo_folder / "runs" / "demo" / "chat")


def test_an_own_loop(demo_folder: Path) -> None:
    names: dict[str, object] = {}
    exec(compile(BLOCKS[1], str(DOCS), "exec"), names)
    losses = names["losses"]
    assert isinstance(losses, list) and len(losses) == 3  # 22 conversations by 8
    assert losses[-1] < losses[0]
    load_config(demo_folder / "runs" / "mine")


def test_there_are_two() -> None:
    assert len(BLOCKS) == 2
