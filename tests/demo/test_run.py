"""The demo from end to end, with few pictures and two steps a stage."""

import json
from pathlib import Path

import pytest
from PIL import Image

from cogvlm_sft.demo import run as demo
from cogvlm_sft.demo.corpus import Sizes

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SHORT = ["train.iterations=2", "train.warmup_iterations=0"]


@pytest.mark.slow
def test_the_demo_ends_with_its_report_and_pictures(tmp_path, monkeypatch, capfd) -> None:
    (tmp_path / "recipes").symlink_to(RECIPES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(RECIPES.parent))
    command = demo.run_command

    def short(*arguments: str) -> None:
        command(*arguments, *(SHORT if arguments[0] == "train" else []))

    monkeypatch.setattr(demo, "run_command", short)
    sizes = Sizes(digit_copies=1, signs=200, shapes=200, photo_crops=2)
    report = demo.run(split="validation", sizes=sizes)
    home = tmp_path / demo.HOME
    assert json.loads((home / "report.json").read_text()) == report
    assert {task: figures["count"] for task, figures in report["tasks"].items()} == {
        "digits": 180,
        "reading": 200,
        "boxes": 200,
        "photos": 24,
    }
    assert {"build", "pretrain", "chat", "evaluate", "total"} <= set(report["seconds"])
    assert 0 < report["peak_memory_gib"] < 4
    for name in ("loss.png", "answers.png"):
        with Image.open(home / name) as picture:
            assert min(picture.size) > 300
    printed = capfd.readouterr().out
    assert "three held-out pictures" in printed and "validation" in printed
