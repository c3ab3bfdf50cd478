"""Runs: resumed after a kill, shared by processes, reported; the files come out the same."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cogvlm_sft.errors import CheckpointError, DataError
from cogvlm_sft.evaluation import run
from cogvlm_sft.evaluation.generate import Request, generate_answers
from cogvlm_sft.evaluation.identity import checkpoint_identity, tokenizer_identity
from cogvlm_sft.evaluation.run import evaluate_checkpoint, evaluate_model
from cogvlm_sft.evaluation.tasks import TASKS, find_task
from cogvlm_sft.model import CogVLMForCausalLM, CogVLMProcessor

from .official_files import make

Tiny = tuple[CogVLMForCausalLM, CogVLMProcessor]


def _rows(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_score_is_the_share_of_right_answers(tiny: Tiny, tmp_path: Path) -> None:
    files, images = make("exact_match", tmp_path)
    first = Request((images / "a.jpg",), "<image>\nWhat digit is this?", "chat")
    own = generate_answers(*tiny, [first], max_new_tokens=find_task("exact_match").max_new_tokens)
    record = json.loads(files[0].read_text().splitlines()[0])
    record["messages"][1]["content"] = own[0] or "nothing"
    files[0].write_text(json.dumps(record) + "\n")
    report = evaluate_model(*tiny, "exact_match", files, images, output=tmp_path / "out")
    assert own[0], "the tiny model says nothing; choose another seed"
    assert report["figures"][0]["value"] == 50
    assert report["count"] == 2
    assert [row["score"] for row in _rows(tmp_path / "out")] == [1, 0]
    assert report["samples"][0]["prediction"] == own[0]


@pytest.mark.parametrize("name", [n for n in TASKS if n not in ("mm_vet", "llava_bench")])
def test_every_task_runs_to_a_report(name: str, tiny: Tiny, tmp_path: Path) -> None:
    files, images = make(name, tmp_path)
    report = evaluate_model(*tiny, name, files, images, output=tmp_path / "out")
    assert report == json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert TASKS[name].title.replace("&", "&amp;") in page
    assert all(figure["interval"][0] <= figure["interval"][1] for figure in report["figures"])
    upload = TASKS[name].upload_name
    if upload:
        assert list((tmp_path / "out").glob(upload.replace("{group}", "*")))
    assert not list((tmp_path / "out").glob("*partial*"))


class _Killed(Exception):
    pass


def test_a_killed_run_goes_on_and_writes_the_same_file(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, images = make("text_exact_match", tmp_path)
    rows = [{"question": f"{'long ' * (n % 5)}question {n}?", "answer": "x"} for n in range(40)]
    files[0].write_text("".join(json.dumps(row) + "\n" for row in rows))

    def evaluate(output: str) -> dict[str, Any]:
        return evaluate_model(
            *tiny, "text_exact_match", files, images, batch_size=2, output=tmp_path / output
        )

    whole = evaluate("whole")
    asked: list[int] = []

    def counted(*arguments: Any, **options: Any) -> list[str]:
        if len(asked) == 1 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise _Killed
        asked.append(len(arguments[2]))
        return generate_answers(*arguments, **options)

    monkeypatch.setattr(run, "generate_answers", counted)
    with pytest.raises(_Killed):
        evaluate("resumed")
    log = next((tmp_path / "resumed").glob("*.partial.jsonl"))
    with log.open("ab") as stream:
        stream.write(b'{"id": "line 3", "predic')  # what a kill in the middle of a write leaves
    assert not (tmp_path / "resumed/predictions.jsonl").exists()
    assert evaluate("resumed") == whole
    assert (tmp_path / "resumed/predictions.jsonl").read_bytes() == (
        tmp_path / "whole/predictions.jsonl"
    ).read_bytes()
    assert sum(asked) == 40  # no chunk was answered twice
    asked.clear()
    assert evaluate("resumed") == whole
    assert not asked  # all there: nothing is generated again


def test_another_run_in_the_same_folder_starts_anew(
    checkpoint: Path, tiny: Tiny, tmp_path: Path
) -> None:
    files, images = make("text_exact_match", tmp_path)
    model, processor = tiny
    out = tmp_path / "out"
    arguments = (model, processor, "text_exact_match", files, images)
    evaluate_model(*arguments, output=out, checkpoint=checkpoint)
    rows = _rows(out)
    (out / "predictions.jsonl").write_text(
        "".join(json.dumps({**row, "prediction": "stale"}) + "\n" for row in rows)
    )
    evaluate_model(*arguments, output=out, checkpoint=checkpoint)
    assert {row["prediction"] for row in _rows(out)} == {"stale"}  # the same run: taken as they are
    (checkpoint / "model.safetensors").touch()
    evaluate_model(*arguments, output=out, checkpoint=checkpoint)
    assert _rows(out) == rows


def test_another_tokenizer_and_another_base_are_another_run(tiny: Tiny, tmp_path: Path) -> None:
    processor = tiny[1]
    seen = tokenizer_identity(processor)
    other = copy.deepcopy(processor)
    other.tokenizer.add_tokens(["another"])
    assert tokenizer_identity(other) != seen == tokenizer_identity(processor)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"1")
    (adapter / "adapter_model.safetensors").write_bytes(b"1")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    before = checkpoint_identity(adapter)
    (base / "model.safetensors").write_bytes(b"22")
    assert checkpoint_identity(adapter) != before


def test_two_questions_of_one_id_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    files, images = make("exact_match", tmp_path)
    with pytest.raises(DataError, match="2 questions have the id 'c0#0', expected one"):
        evaluate_model(*tiny, "exact_match", files * 2, images)


def test_each_pope_file_has_its_own_upload(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, images = make("pope", tmp_path)
    monkeypatch.setattr(run, "generate_answers", lambda *a, **k: ["yes"] * len(a[2]))
    evaluate_model(*tiny, "pope", files, images, output=tmp_path / "out")
    for kind in ("random", "adversarial"):  # the script joins answers and labels line by line
        lines = (tmp_path / f"out/pope_{kind}_answers.jsonl").read_text().splitlines()
        labels = (tmp_path / f"coco_pope_{kind}.json").read_text().splitlines()
        assert [json.loads(one)["question"] for one in lines] == [
            json.loads(one)["text"] for one in labels
        ]


def test_a_restart_deals_what_is_left_to_all_processes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, images = make("text_exact_match", tmp_path)
    rows = [{"question": f"question {n}?", "answer": "x"} for n in range(64)]
    files[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = find_task("text_exact_match")
    questions = task.read(files, images)
    # Eight chunks of eight; those of process 0 of two are there.
    done = [index for chunk in run.chunks(questions, 1)[::2] for index in chunk]
    known = {questions[index].id: "there" for index in done}
    monkeypatch.setattr(run, "generate_answers", lambda *a, **k: ["new"] * len(a[2]))
    shares = [
        run._answers(*tiny, task, questions, 1, None, known, process, 2).count("new")
        for process in range(2)
    ]
    assert shares == [16, 16]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(checkpoint: Path, tmp_path: Path) -> None:
    files, _ = make("text_exact_match", tmp_path)
    rows = [{"question": f"question {n}?", "answer": "x"} for n in range(40)]
    files[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = evaluate_checkpoint(
        checkpoint, "text_exact_match", files, batch_size=2, output=tmp_path / "one"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "cogvlm_sft.cli", "evaluate", str(checkpoint), "--task", "text_exact_match",
               "--annotations", str(files[0]), "--batch-size", "2",
               "--output", str(tmp_path / "two")]  # fmt: skip
    two = subprocess.run([sys.executable, *launcher, *command], capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout) == one
    name = "predictions.jsonl"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    text = tmp_path / "plain.txt"
    text.write_text("What digit is this? " * 40, encoding="utf-8")
    command[command.index("text_exact_match")] = "text_perplexity"
    command[command.index(str(files[0]))] = str(text)
    alone = subprocess.run([sys.executable, *launcher, *command], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    assert json.loads(alone.stdout)["count"] > 0


def test_a_judge_gives_the_judged_tasks_their_score(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, images = make("mm_vet", tmp_path)
    asked: list[int] = []
    monkeypatch.setattr(
        run, "generate_answers", lambda *a, **k: asked.append(k["num_beams"]) or ["x"] * len(a[2])
    )
    without = evaluate_model(*tiny, "mm_vet", files, images)
    assert without["figures"] == []
    judged = evaluate_model(*tiny, "mm_vet", files, images, judge=lambda *_: (0.5, 1.0))
    assert judged["figures"][0]["value"] == 50
    assert asked == [5, 5]
    files, images = make("gqa", tmp_path)
    with pytest.raises(DataError, match="takes no judge"):
        evaluate_model(*tiny, "gqa", files, images, judge=lambda *_: (0.5, 1.0))


def test_the_page_shows_the_boxes_and_escapes_what_the_model_says(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, images = make("refcoco", tmp_path)
    said = "<script>alert(1)</script> [[600,600,900,900]]"
    monkeypatch.setattr(run, "generate_answers", lambda *a, **k: [said] * len(a[2]))
    report = evaluate_model(*tiny, "refcoco", files, images, output=tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/jpeg;base64,") == len(report["worst"]) > 0
    assert "92.76" in page and "README of THUDM/CogVLM" in page


def test_text_is_scored_without_pictures(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "plain.txt"
    text.write_text("What digit is this? " * 40, encoding="utf-8")
    report = evaluate_model(*tiny, "text_perplexity", [text], output=tmp_path / "out")
    names = [figure["name"] for figure in report["figures"]]
    assert names == ["perplexity", "bits per byte", "tokens predicted first"]
    # Random weights: worse than a uniform guess over the vocabulary, better than nothing at all.
    assert 50 < report["figures"][0]["value"] < 1e6
    (tmp_path / "rows.jsonl").write_text('{"text": "What digit is this?"}\n')
    with pytest.raises(DataError, match=r"rows\.txt: cannot be read"):
        evaluate_model(*tiny, "text_perplexity", [tmp_path / "rows.txt"])
    assert evaluate_model(*tiny, "text_perplexity", [tmp_path / "rows.jsonl"])["count"] == 1


def test_lines_taken_out_of_the_predictions_are_asked_again(tiny: Tiny, tmp_path: Path) -> None:
    files, images = make("text_exact_match", tmp_path)
    arguments = (*tiny, "text_exact_match", files, images)
    report = evaluate_model(*arguments, output=tmp_path / "out")
    whole = (tmp_path / "out/predictions.jsonl").read_bytes()
    (tmp_path / "out/predictions.jsonl").write_bytes(whole.splitlines(keepends=True)[1])
    assert evaluate_model(*arguments, output=tmp_path / "out") == report
    assert (tmp_path / "out/predictions.jsonl").read_bytes() == whole
    assert not list((tmp_path / "out").glob("*partial*"))


def test_a_look_at_a_few_leaves_the_whole_run(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copied)
    files, images = make("text_exact_match", tmp_path)
    arguments = (copied, "text_exact_match", files, images)
    evaluate_checkpoint(*arguments)
    evaluate_checkpoint(*arguments, limit=1)
    assert len(_rows(copied / "evaluation/text_exact_match")) == 2
    assert len(_rows(copied / "evaluation/text_exact_match_first_1")) == 1
    assert "anew" not in capsys.readouterr().err
    # After running out of memory one takes smaller batches, and keeps what is answered.
    evaluate_checkpoint(*arguments, batch_size=1)
    assert "going on, 2 of 2 are there" in capsys.readouterr().err
    evaluate_checkpoint(*arguments, limit=1, output=copied / "evaluation/text_exact_match")
    said = "starting anew: the answers there were of another run, by its questions"
    assert said in capsys.readouterr().err


def test_files_are_read_before_the_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, images = make("gqa", tmp_path)
    monkeypatch.setattr(run, "open_model", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(DataError, match=r"nope\.json: no such annotation file"):
        evaluate_checkpoint(checkpoint, "gqa", [tmp_path / "nope.json"], images)
    with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
        evaluate_checkpoint(checkpoint, "text_perplexity", [tmp_path / "nope.txt"])
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        evaluate_checkpoint(checkpoint, "gqa", files, images, tokenizer=tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tiny: Tiny, tmp_path: Path) -> None:
    files, images = make("gqa", tmp_path)
    (tmp_path / "out/run.json").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"run\.json: cannot be written"):
        evaluate_model(*tiny, "gqa", files, images, output=tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["run.json"]


def test_mistakes_are_named(checkpoint: Path, tmp_path: Path) -> None:
    files, images = make("exact_match", tmp_path)
    with pytest.raises(DataError, match="did you mean 'exact_match'"):
        evaluate_checkpoint(checkpoint, "exact_mach", files, images)
    with pytest.raises(CheckpointError):
        evaluate_checkpoint(tmp_path / "none", "exact_match", files, images)
    with pytest.raises(DataError, match="holds no box"):
        evaluate_checkpoint(checkpoint, "box_iou", files, images, output=tmp_path / "out")
    with pytest.raises(DataError, match="limit is 0"):
        evaluate_checkpoint(checkpoint, "exact_match", files, images, limit=0)
    with pytest.raises(DataError, match="nowhere does not exist; give the pictures"):
        evaluate_checkpoint(checkpoint, "gqa", make("gqa", tmp_path)[0], tmp_path / "nowhere")
