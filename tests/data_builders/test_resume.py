"""A build that is killed, stopped or out of disk goes on where it was, to the same bytes."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from cogvlm_sft.errors import DataError
from data_builders import annotations, picture_shards, record_shards
from data_builders.build import BuildInterrupted, build
from data_builders.workfolder import work_folder

ROOT = Path(__file__).resolve().parents[2]
# Small shards, and stages that take the seconds given, so that a kill finds the build at work.
# A job in a shell's background ignores Ctrl-C, and its children do; the build is to hear it here.
SLOW_BUILD = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from data_builders import annotations, image_check, picture_shards, record_shards, source
annotations.CHUNK, picture_shards.SHARD, picture_shards._ITEM = 3000, 30, 5
picture_shards._SMALL = record_shards.PARALLEL_FROM = 10**12 * (sys.argv[2] == "workers=1")
def slow(function, seconds):
    def wait(*given, **named):
        time.sleep(seconds)
        return function(*given, **named)
    return wait
seconds = float(os.environ["SECONDS_A_SHARD"])
source.RecordStage.run = slow(source.RecordStage.run, seconds)
picture_shards.CheckStage.run = slow(picture_shards.CheckStage.run, seconds)
from cogvlm_sft.cli import main
if __name__ == "__main__":
    sys.exit(main(["data", "build", *sys.argv[1:]]))
"""


@pytest.fixture
def corpus(root, picture, write_json, tmp_path):
    """A recipe of two sources whose annotation files make dozens of shards."""
    for number in range(150):
        picture(root / f"{number:012d}.jpg", number, size=(36, 30))
    llava = [
        {"id": str(n), "image": f"{n % 160:012d}.jpg", "conversations": [
            {"from": "human", "value": f"<image>\nWhat is number {n}?"},
            {"from": "gpt", "value": f"It is number {n // 2} of all."}]}
        for n in range(800)
    ]  # fmt: skip
    rows = [
        {"image": f"{n % 150:012d}.jpg", "question": f"Is it {n}?", "answer": f"No, {n}."}
        for n in range(1500)
    ]
    content = {
        "out": str(tmp_path / "build"), "image_root": str(root), "seed": 3, "shard_size": 60,
        "workers": 1,
        "sources": [
            {"source": "llava_instruct", "annotations": [str(write_json("llava.json", llava))]},
            {"source": "custom_vqa", "annotations": [str(write_json("mine.json", rows))]},
        ],
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def begun(work: Path) -> list[str]:
    journal = work / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True) if journal.is_file() else []
    return [json.loads(line)["begun"] for line in lines if line.endswith("\n")]


def start(script: Path, recipe: Path, workers: int, seconds: float = 0.03) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(script), str(recipe), f"workers={workers}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SECONDS_A_SHARD": str(seconds)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "slow_build.py"
    path.write_text(SLOW_BUILD)
    return path


@pytest.mark.slow
def test_killed_ten_times(corpus, script, tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "CHUNK", 3000)
    whole = digest(build(corpus, [f"out={tmp_path}/whole"]).out)
    work = tmp_path / ".build.building"
    moments = random.Random(5)
    known: list[str] = []
    killed = 0
    redone = []
    while killed < 10:
        # At most half of the some ninety shards in all, so that a late kill still finds work.
        process = start(script, corpus, 1 + killed % 2, seconds=0.08)
        further = moments.randint(1, 4)
        while len(begun(work)) < len(known) + further and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.08))
        assert process.poll() is None, f"ended before kill {killed}: {process.communicate()}"
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate()
        killed += 1
        now = begun(work)
        redone.append(len(set(now[len(known) :]) & set(known)))
        assert len(set(now[len(known) :])) == len(now[len(known) :])
        known = now
        assert not psutil.wait_procs(family, timeout=120)[1]  # no worker outlives its parent
    assert max(redone) <= 1, redone
    last = start(script, corpus, workers=2)
    output, errors = last.communicate()
    assert last.returncode == 0, errors
    assert "went on with an interrupted build" in output
    assert digest(tmp_path / "build") == whole
    assert not work.exists()


@pytest.mark.slow
def test_control_c_says_how_to_go_on(corpus, script, tmp_path):
    process = start(script, corpus, 1, seconds=0.15)
    work = tmp_path / ".build.building"
    while len(begun(work)) < 2 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert f"what is done is kept in {work}" in errors and "Build again" in errors
    assert "Traceback" not in errors
    done = build(corpus)
    assert done.kept_shards >= 0 and done.redone_shards <= 1
    assert not work.exists()


@pytest.mark.slow
def test_progress_shows_rate_and_time_left(corpus, script):
    process = start(script, corpus, 1)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    for what, unit in (("reading", "B/s"), ("pictures", " pictures/s"), ("writing", "tions/s")):
        lines = [line for line in errors.replace("\r", "\n").splitlines() if what in line]
        assert unit in lines[-1] and "<00:00" in lines[-1] and "100%" in lines[-1]


def test_shards_go_on_only_while_nothing_has_changed(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(picture_shards, "SHARD", 40)
    stopped = 0

    def stop_late(*given, **named):
        nonlocal stopped
        stopped += 1
        if stopped > 2:
            raise KeyboardInterrupt
        return check(*given, **named)

    check = picture_shards.CheckStage.run
    twins = tmp_path / "image_data.json"
    twins.write_text('[{"image_id": 1, "coco_id": null}]')
    rules = [f"decontaminate.visual_genome={twins}"]
    for change in ("nothing", "recipe", "annotations", "picture", "visual_genome"):
        stopped = 0
        monkeypatch.setattr(picture_shards.CheckStage, "run", stop_late)
        with pytest.raises(BuildInterrupted, match="interrupted"):
            build(corpus, rules)
        monkeypatch.setattr(picture_shards.CheckStage, "run", check)
        if change == "annotations":
            path = tmp_path / "mine.json"
            path.write_text(path.read_text().replace("Is it 7?", "Is it seven?"))
        elif change == "picture":
            os.utime(tmp_path / "pictures" / "000000000003.jpg", ns=(5, 5))
        elif change == "visual_genome":
            twins.write_text('[{"image_id": 1, "coco_id": 22}]')
        done = build(corpus, [*rules, "seed=4"] if change == "recipe" else rules)
        assert (done.kept_shards > 0) == (change == "nothing"), change
        fresh = digest(
            build(corpus, [*rules, f"out={tmp_path}/fresh", f"seed={done.manifest['seed']}"]).out
        )
        assert digest(done.out) == fresh


def test_a_torn_spill_is_noticed(corpus, tmp_path, monkeypatch):
    """After a power failure the last lines may be missing though the shard's numbers are there."""
    whole = digest(build(corpus, [f"out={tmp_path}/whole"]).out)

    def stop(*_given, **_named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(picture_shards.CheckStage, "run", stop)
        with pytest.raises(BuildInterrupted):
            build(corpus)
    spill = tmp_path / ".build.building" / "spill.bin"
    spill.write_bytes(spill.read_bytes()[:-1000] + bytes(1000))
    assert digest(build(corpus).out) == whole


def test_two_builds_at_one_place(corpus, tmp_path):
    with (
        work_folder(tmp_path / "build"),
        pytest.raises(DataError, match="another process is building there"),
    ):
        build(corpus)


def test_a_dead_worker_is_named(corpus, monkeypatch, tmp_path):
    monkeypatch.setattr(record_shards, "PARALLEL_FROM", 0)
    monkeypatch.setattr(record_shards, "make_stage", _DyingStage)
    with pytest.raises(DataError, match=r"worker process died.*fewer `workers`"):
        build(corpus, ["workers=2"])
    assert (tmp_path / ".build.building").is_dir()


class _DyingStage:
    def __init__(self, *_given):
        pass

    def run(self, _item):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 400 KiB; without the right to mount one, a limit on the size of files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode == 0:
        yield folder, None
        subprocess.run(["umount", "-l", str(folder)], check=True)
    else:
        yield folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))


def test_disk_full(corpus, small_disk, tmp_path):
    folder, limit = small_disk
    out = f"out={folder}/build"
    earlier = build(corpus, [f"out={tmp_path}/small", "sources.0.max=9", "sources.1.max=9"]).out
    earlier = Path(shutil.copytree(earlier, folder / "build"))
    before = digest(earlier)
    process = subprocess.run(
        [sys.executable, "-m", "cogvlm_sft.cli", "data", "build", str(corpus), out],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=limit, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 2, process.stderr
    message = process.stderr.splitlines()[-1]
    assert message.startswith("error: ") and "the disk is full; free some space" in message
    assert "Traceback" not in process.stderr
    assert digest(earlier) == before
    if limit is None:
        subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
    again = build(corpus, [out])
    assert digest(again.out) == digest(build(corpus, [f"out={tmp_path}/whole"]).out)
