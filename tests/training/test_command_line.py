"""A user's mistakes at the command line: one clear line, status 2, nothing half-written."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cogvlm_sft.cli import main
from cogvlm_sft.recipe import Recipe


class Result(NamedTuple):
    status: int
    stderr: str


Run = Callable[..., Result]


@pytest.fixture
def train(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs `cogvlm-sft train` on a recipe file, with overrides, in this process.

    An exception that the command line does not turn into a message fails the test by itself.
    """

    def run(*overrides: str, **changes: Any) -> Result:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(make_recipe(**changes).to_yaml(), encoding="utf-8")
        status = main(["train", str(recipe), *overrides])
        return Result(status, capsys.readouterr().err)

    return run


def refused(result: Result, *expected: str) -> None:
    assert result.status == 2, result.stderr
    assert result.stderr.startswith("error: "), result.stderr
    for text in expected:
        assert text in result.stderr, result.stderr


def rewrite(world: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """A copy of the conversations whose third record is changed."""
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    change(rows[2])
    path = tmp_path / "changed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_machine_says_a_recipe_mistake_once(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    said = train("train.iteration=3")
    assert said.status == 2
    assert not said.stderr


def test_recipe_mistakes(train: Run, tmp_path: Path) -> None:
    refused(train("train.iteration=3"), "train.iteration", "did you mean 'train.iterations'")
    refused(train("train.iterations=many"), "train.iterations", "'many'", "integer")
    refused(train("train.micro_batch_size=3"), "global_batch_size 4", "micro_batch_size 3")
    refused(train("data.max_length=6"), "6", "max_length")
    missing = train("model.checkpoint=nowhere/cogvlm", "model.config=null")
    refused(missing, "nowhere/cogvlm")
    refused(train("data.image_root=nowhere"), "nowhere")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda row: row.update(images=["gone.png"]), "gone.png"),
        (lambda row: row.update(images=["02.png", "03.png"]), "2 image(s)"),
        (lambda row: row["messages"].pop(), "no assistant turn"),
        (lambda row: row.update(images=["../02.png"]), "leaves the image root"),
        (lambda row: row.update(images=["/etc/hostname"]), "leaves the image root"),
    ],
    ids=["missing image", "image count", "no answer", "climbs out", "absolute"],
)
def test_record_mistakes(
    train: Run,
    world: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    expected: str,
) -> None:
    path = rewrite(world, tmp_path, change)
    refused(train(data__train=[{"path": path}]), f"{path}:3", expected)
    assert not (tmp_path / "run").exists()


def test_truncated_jpeg(train: Run, world: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture = world / "images" / "cut.jpg"
    Image.effect_noise((64, 64), 90).convert("RGB").save(picture)
    picture.write_bytes(picture.read_bytes()[:-700])
    path = rewrite(world, tmp_path, lambda row: row.update(images=["cut.jpg"]))
    refused(train(data__train=[{"path": path}]), "cut.jpg", f"{path}:3")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_chat_recipe_says_what_this_machine_lacks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cogvlm_sft.cli", "train", "chat"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=900)
    found = Result(result.returncode, result.stderr)
    refused(found, "checkpoints/cogvlm-base-490-hf", "checkpoints/vicuna-7b-v1.5", "GiB")
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_same_seed_same_bytes(train: Run, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        out = tmp_path / name
        result = train(f"train.output={out}", "train.iterations=3")
        assert result.status == 0, result.stderr
        digests.append((out / "model.safetensors").read_bytes())
    assert digests[0] == digests[1]


COMMANDS = [
    "",
    "train",
    "estimate",
    "evaluate",
    "chat",
    "data",
    "data sources",
    "data build",
    "data verify",
    "data export",
    "data preview",
    "checkpoint merge",
    "recipe",
    "recipe list",
    "recipe show",
    "recipe copy",
    "recipe check",
    "recipe keys",
]


def test_a_recipe_scores_its_tasks_on_the_finished_checkpoint(
    train: Run, world: Path, tmp_path: Path
) -> None:
    (tmp_path / "plain.txt").write_text("What colour is it? It is red.", encoding="utf-8")
    tasks = [
        {
            "name": "exact_match",
            "annotations": [str(world / "train.jsonl")],
            "images": str(world / "images"),
            "limit": 3,
        },
        {"name": "text_perplexity", "annotations": [str(tmp_path / "plain.txt")]},
    ]
    refused(
        train("train.iterations=2", evaluate__tasks=[{**tasks[0], "name": "exact"}]),
        "evaluate.tasks.0",
        "did you mean 'exact_match'",
    )
    refused(train("evaluate={batch_size: 2}"), "evaluate.every is null")
    refused(train("evaluate.max_new_tokens=9", evaluate__tasks=tasks), "evaluate.prompts is empty")
    assert not (tmp_path / "run").exists()
    done = train("train.iterations=2", evaluate__tasks=tasks)
    assert done.status == 0, done.stderr
    report = json.loads((tmp_path / "run/evaluation/report.json").read_text(encoding="utf-8"))
    assert [task["task"] for task in report["tasks"]] == ["exact_match", "text_perplexity"]
    assert report["tasks"][0]["count"] == 3
    assert (tmp_path / "run/evaluation/00_exact_match/predictions.jsonl").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "example:" in printed
    assert f"cogvlm-sft {command}".strip() in printed


def test_packaged_recipes_can_be_listed_shown_copied_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", "list"]) == 0
    assert "chat" in capsys.readouterr().out
    copy = tmp_path / "mine.yaml"
    assert main(["recipe", "copy", "chat", str(copy)]) == 0
    assert main(["recipe", "check", str(copy), "train.output=runs/other"]) == 0
    assert main(["recipe", "copy", "chat", str(copy)]) == 2
    assert main(["recipe", "check", str(copy), "tune.visual_exprt.rate=2"]) == 2
    assert "visual_expert" in capsys.readouterr().err


def test_no_command_shows_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "talk to a checkpoint" in capsys.readouterr().err


def test_versions_for_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:2] == ["cogvlm-sft", "torch"]


def test_settings_and_flags_stand_in_any_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["train.output=runs/x", "train.micro_batch_size=2"]
    assert main(["train", "demo/chat", settings[0], "--print", settings[1]]) == 0
    printed = capsys.readouterr().out
    assert "output: runs/x" in printed and "micro_batch_size: 2" in printed
    for wrong in (["extra"], ["--outptu=x"]):
        with pytest.raises(SystemExit) as status:
            main(["train", "demo/chat", "--print", *wrong])
        assert status.value.code == 2
        assert f"unrecognized arguments: {wrong[0]}" in capsys.readouterr().err


def test_counts_are_from_one(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "x", "--task", "exact_match", "--annotations", "y", "--batch-size", "0"]
    with pytest.raises(SystemExit) as status:
        main(command)
    assert status.value.code == 2
    assert "--batch-size: 0 is below 1" in capsys.readouterr().err
