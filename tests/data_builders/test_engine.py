"""Where a build runs does not change it: this process, worker processes, or a Ray cluster."""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_builders import annotations, picture_shards, record_shards
from data_builders.build import build
from data_builders.engine import stage_map

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus(root, picture, write_json, tmp_path):
    """Two sources, one of several files; near-duplicates, drops and a bad picture among them."""
    for number in range(60):
        shown = picture(root / f"{number:012d}.jpg", number % 40, size=(64, 48))
        shown.write_bytes(shown.read_bytes() + b"\0" * (number // 40))  # other bytes, same pixels
    (root / "000000000059.jpg").write_bytes(b"no picture")
    llava = [
        {"id": f"{n}", "image": f"{n % 62:012d}.jpg", "conversations": [
            {"from": "human", "value": f"<image>\nQuestion {n % 130}?"},
            {"from": "gpt", "value": f"Answer {n % 130} 猫"}]}
        for n in range(400)
    ]  # fmt: skip
    rows = [
        {"image": f"{n % 60:012d}.jpg", "question": f"Is it {n % 40}?", "answer": f"No, {n % 40}."}
        for n in range(300)
    ]
    files = [str(write_json(f"mine{part}.json", rows[part::3])) for part in range(3)]
    content = {
        "out": str(tmp_path / "build"), "image_root": str(root), "seed": 3, "shard_size": 150,
        "workers": 1, "deduplicate": {"near": 4},
        "sources": [
            {"source": "llava_instruct", "annotations": [str(write_json("llava.json", llava))]},
            {"source": "custom_vqa", "annotations": files, "weight": 1.5},
        ],
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def in_pieces(monkeypatch):
    """Work is cut so small that every worker gets some."""
    monkeypatch.setattr(annotations, "CHUNK", 3000)
    monkeypatch.setattr(record_shards, "PARALLEL_FROM", 0)
    monkeypatch.setattr(picture_shards, "_SMALL", 0)
    monkeypatch.setattr(picture_shards, "_ITEM", 4)


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


class BlockedStage:
    """Tells whether its process would notice Ctrl-C."""

    def run(self, item):
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_workers_never_notice_ctrl_c():
    """Not while they start either, when no handler of ours is in place yet."""
    with stage_map("local", 2, BlockedStage) as over:
        assert list(over(range(8))) == [True] * 8
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.slow
def test_one_two_and_four_workers(corpus, tmp_path, in_pieces):
    first = build(corpus)
    assert first.manifest["totals"]["dropped"] > 100 and len(first.manifest["files"]) > 2
    assert first.manifest["sources"]["custom_vqa"]["dropped"]["near_duplicate"] > 0
    for workers in (2, 4):
        again = build(corpus, [f"out={tmp_path}/w{workers}", f"workers={workers}"])
        assert digest(again.out) == digest(first.out)


def test_file_order_and_hash_seed(corpus, tmp_path, root):
    """Annotation files listed the other way, pictures created in another order, another seed."""
    first = digest(build(corpus).out)
    content = yaml.safe_load(corpus.read_text())
    content["sources"][1]["annotations"].reverse()
    content["out"] = str(tmp_path / "again")
    turned = tmp_path / "turned.yaml"
    turned.write_text(yaml.safe_dump(content))
    for path in sorted(root.iterdir(), reverse=True):  # a directory lists in order of creation
        path.rename(tmp_path / "moved")
        (tmp_path / "moved").rename(path)
    code = f"from data_builders.build import build; build({str(turned)!r})"
    for seed in ("1", "77"):
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert digest(tmp_path / "again") == first


def test_results_come_in_order_and_lazily():
    taken = []

    def items():
        for number in range(40):
            taken.append(number)
            yield number

    with stage_map("local", 2, _Slow) as over:
        results = over(items())
        assert next(results) == 0 and len(taken) <= 6  # two workers, twice as many in waiting
        assert list(results) == [number * number for number in range(1, 40)]


class _Slow:
    def run(self, item):
        import time

        time.sleep(0.01 * (item % 3))
        return item * item


RAY_BUILD = """
import json, sys
from data_builders import annotations, picture_shards
annotations.CHUNK, picture_shards._ITEM = 15000, 15
from cogvlm_sft.cli import main
import ray
if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    from_items = ray.data.from_items
    def counted(rows, **keys):
        print("items", len(rows))
        return from_items(rows, **keys)
    ray.data.from_items = counted
    sys.exit(main(["data", "build", *sys.argv[1:], "workers=2", "--engine", "ray"]))
"""


@pytest.mark.slow
def test_ray_builds_the_same_bytes(corpus, tmp_path, in_pieces):
    """On two local workers, through the command line."""
    if importlib.util.find_spec("ray") is None:
        missing = "needs Ray Data: pip install 'cogvlm-sft[ray]'"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    first = build(corpus, ["shard_size=1000"])
    script = tmp_path / "ray_build.py"
    script.write_text(RAY_BUILD)
    done = subprocess.run(
        [sys.executable, str(script), str(corpus), f"out={tmp_path}/ray", "shard_size=1000"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    items = [int(line.split()[1]) for line in done.stdout.splitlines() if line[:5] == "items"]
    assert len(items) == 3 and min(items) > 1  # two sources and pictures, in several pieces each
    assert digest(tmp_path / "ray") == digest(first.out)
    manifest = json.loads((tmp_path / "ray" / "manifest.json").read_text())
    assert "engine" not in manifest["recipe"]
