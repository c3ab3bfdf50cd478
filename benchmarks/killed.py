"""A run that is killed again and again ends with the weights of an unbroken one.

    python -m benchmarks.killed                      200 steps of the demo's first stage, ten kills

The demo's recipe is trained twice on a small corpus: once in one piece, once with SIGKILL at ten
random moments: some at any time after the start (while it imports, checks the data, loads a
snapshot), some within seconds of a step (while it trains or writes a snapshot). Both final
checkpoints are compared byte for byte. The moments come from a seed and the machine's speed.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cogvlm_sft.demo.corpus import Sizes, make_corpus
from cogvlm_sft.demo.run import HOME, training_texts
from cogvlm_sft.demo.tokenizer import train_tokenizer
from cogvlm_sft.recipe.files import packaged_recipes
from cogvlm_sft.training import snapshots
from cogvlm_sft.training.telemetry import read_metrics


def main() -> int:
    """0 where the bytes are the same."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.killed")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        examples = make_corpus(HOME, Sizes(digit_copies=1, signs=400, shapes=400, photo_crops=4))
        train_tokenizer(training_texts(examples), HOME / "tokenizer")
        _command("data", "build", str(packaged_recipes()["demo/pretrain_data"])).wait()
        recipe = ["train", "demo/pretrain", f"train.iterations={options.steps}"]
        recipe += ["train.save_every=2", "train.keep_snapshots=2", "train.log_every=1"]
        recipe += ["train.global_batch_size=4", "train.micro_batch_size=4"]
        whole, broken = HOME / "whole", HOME / "broken"
        _command(*recipe, f"train.output={whole}").wait()

        chance = random.Random(options.seed)
        for number in range(options.kills):
            process = _command(*recipe, f"train.output={broken}")
            if number % 2:
                moment = "at any time"
                time.sleep(chance.uniform(0.5, 12))
            else:
                moment = "after a step"
                _wait_for_a_step(broken, process)
                time.sleep(chance.uniform(0, 2))
            if process.poll() is not None:
                print(f"kill {number + 1}: the run was over before")
                break
            process.kill()
            process.wait()
            newest = snapshots.newest_complete(broken)
            at = snapshots.snapshot_step(newest) if newest else 0
            print(f"kill {number + 1} ({moment}): at step {_step(broken)}, goes on from {at}")
        status = _command(*recipe, f"train.output={broken}").wait()
        one, other = ((run / "model.safetensors").read_bytes() for run in (whole, broken))
        print(f"last run ended with status {status}; same bytes: {one == other}")
        return int(one != other)


def _command(*arguments: str) -> "subprocess.Popen[bytes]":
    quiet = subprocess.DEVNULL
    call = [sys.executable, "-m", "cogvlm_sft.cli", *arguments]
    return subprocess.Popen(call, stdout=quiet, stderr=quiet)


def _step(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.is_file() else []
    return rows[-1]["step"] if rows else 0


def _wait_for_a_step(output: Path, process: "subprocess.Popen[bytes]") -> None:
    """Until the run has made a step of its own."""
    newest = snapshots.newest_complete(output)
    before = snapshots.snapshot_step(newest) if newest else 0
    metrics = output / "metrics.jsonl"
    stamp = metrics.stat().st_mtime if metrics.is_file() else 0.0
    while process.poll() is None:
        time.sleep(0.05)
        moved = metrics.is_file() and metrics.stat().st_mtime > stamp
        if moved and _step(output) > before:
            return


if __name__ == "__main__":
    raise SystemExit(main())
