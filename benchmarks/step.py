"""One training step against the obvious one: uniform and ragged batches, share of matmul peak.

python -m benchmarks.step [--rounds N] [--threads N] [--batch uniform|ragged]
python -m benchmarks.step --peak      peak memory of two steps of each, in processes of their own
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from typing import Any

import psutil
import torch

from benchmarks.baseline import baseline_loss
from benchmarks.measure import interleave, matmuls, report
from benchmarks.models import MEDIUM, RESULTS, build, items_of, padded
from cogvlm_sft.training.flops import Work, training_flops

TRAINED = ("language", "visual_expert", "adapter", "embeddings")
SIZE = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", choices=("uniform", "ragged"), help="one of the two only")
    parser.add_argument("--peak", action="store_true", help="measure memory instead")
    parser.add_argument("--peak-of", choices=("baseline", "ours"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak_of is not None:
        print(json.dumps(peak_memory(given.peak_of)))
        return
    if given.peak:
        report("peak", peaks(given.threads), RESULTS)
        return
    from benchmarks.trainer import step, trainer_for  # 0.2 GiB of libraries

    model = build(MEDIUM)
    trainer = trainer_for(model)
    products = matmuls(SIZE)
    rows: list[dict[str, Any]] = []
    for name, texts in (("uniform", (128,) * 4), ("ragged", (128, 112, 96, 80))):
        if given.batch not in (None, name):
            continue
        items = items_of(model.config, texts, 64)
        batch = padded(items)

        def bare() -> None:
            model.zero_grad(set_to_none=True)
            model(**batch, supervised_only=True).loss.backward()  # noqa: B023

        def baseline() -> None:
            model.zero_grad(set_to_none=True)
            baseline_loss(model, batch).backward()  # noqa: B023

        def without_onednn() -> None:
            torch.backends.mkldnn.enabled = False
            bare()
            torch.backends.mkldnn.enabled = True

        ways = {
            "baseline": baseline,
            "trainer": lambda: step(trainer, batch),  # noqa: B023
            "bare model": bare,
            "without oneDNN": without_onednn,
            **products,
        }
        with torch.no_grad():
            ours = model(**batch, supervised_only=True).loss
            theirs = baseline_loss(model, batch)
        times = interleave(ways, given.rounds)
        lengths = [len(item["input_ids"]) for item in items]
        work = Work(sum(lengths), sum(n * n for n in lengths), len(items), 64 * len(items))
        needed = training_flops(model.config, TRAINED, work)
        # The peak of the machine is the faster library's; torch.mm's stands beside it.
        fastest = min(products, key=times.median)
        peak, of_torch = (2 * SIZE**3 / times.median(name) for name in (fastest, "torch.mm"))
        for way in ("trainer", "bare model", "without oneDNN"):
            ratio = times.ratio("baseline", way)
            over_bare = times.ratio(way, "bare model")
            rows.append(
                {
                    "batch": name, "way": way, "seconds": times.median(way),
                    "baseline s": times.median("baseline"),
                    **{f"x {key}": value for key, value in ratio.items()},
                    "over bare": over_bare["wall"], "over bare cpu": over_bare["cpu"],
                    "GFLOP": needed / 1e9, "peak GFLOP/s": peak / 1e9,
                    "of peak": needed / times.median(way) / peak,
                    "best of peak": needed / min(times.wall[way]) * min(times.wall[fastest])
                    / (2 * SIZE**3),
                    "torch.mm GFLOP/s": of_torch / 1e9,
                    "of torch.mm": needed / times.median(way) / of_torch,
                    "loss difference": abs(float(ours - theirs)) / float(theirs),
                }
            )  # fmt: skip
    report("step", rows, RESULTS)


def peaks(threads: int) -> list[dict[str, Any]]:
    """Peak memory of both ways, as glibc manages it by default and with freed blocks returned.

    By default glibc keeps freed blocks below 32 MiB for itself: faster, and in pieces.
    """
    rows: list[dict[str, Any]] = []
    for kept, threshold in (("kept", {}), ("returned", {"MALLOC_MMAP_THRESHOLD_": "65536"})):
        found = []
        for way in ("baseline", "ours"):
            command = [sys.executable, "-m", "benchmarks.step", "--peak-of", way,
                       "--threads", str(threads)]  # fmt: skip
            printed = subprocess.run(
                command, env={**os.environ, **threshold}, capture_output=True, text=True, check=True
            ).stdout
            found.append(json.loads(printed.splitlines()[-1]))
        first = found[0]
        for row in found:
            row["of baseline"] = row["peak GiB"] / first["peak GiB"]
            row["of baseline, above before"] = (row["peak GiB"] - row["before GiB"]) / (
                first["peak GiB"] - first["before GiB"]
            )
            rows.append({"freed blocks": kept, **row})
    return rows


def peak_memory(way: str) -> dict[str, float | str]:
    """GiB resident before (libraries and weights), and at most during two steps, uniform batch."""
    model = build(MEDIUM)
    batch = padded(items_of(model.config, (128,) * 4, 64))
    before = psutil.Process().memory_info().rss
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        loss = (
            baseline_loss(model, batch)
            if way == "baseline"
            else model(**batch, supervised_only=True).loss
        )
        loss.backward()
    highest = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"way": way, "before GiB": before / 2**30, "peak GiB": highest / 2**30}


if __name__ == "__main__":
    main()
