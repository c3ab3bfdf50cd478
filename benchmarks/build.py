"""Builds the alignment mixture at its published size from generated annotation files.

Writes 157,712 LLaVA, 342,799 LRV and 173,212 LLaVAR records (LLaVA's part inside) without pictures,
builds them with picture checks off, and compares with one plain orjson read and write of the same
files in the same process. The bounds are 6 times that and 1.5 GiB.

    python -m benchmarks.build [--folder DIR] [--workers N]
"""

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson

from data_builders.build import build_recipe
from data_builders.recipe import parse_recipe

LLAVA, LRV, LLAVAR = 157_712, 342_799, 15_500
RESULT = "result.json"
WORDS = [
    "the",
    "a",
    "bus",
    "red",
    "street",
    "sign",
    "man",
    "woman",
    "with",
    "holding",
    "white",
    "two",
    "near",
    "water",
    "table",
    "on",
    "of",
]


def sentence(generator: random.Random, low: int, high: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(low, high))).capitalize() + "."


def dialogue(generator: random.Random, number: int, image: str) -> dict[str, Any]:
    turns = []
    for pair in range(generator.choice((1, 1, 3, 4))):
        question = sentence(generator, 6, 14)
        if not pair:
            question = f"<image>\n{question}" if number % 2 else f"{question}\n<image>"
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": sentence(generator, 10, 120)})
    return {"id": image.removesuffix(".jpg"), "image": image, "conversations": turns}


def generate(folder: Path) -> None:
    generator = random.Random(0)
    llava = [dialogue(generator, n, f"{generator.randrange(581929):012d}.jpg")
             for n in range(LLAVA)]  # fmt: skip
    (folder / "llava.json").write_bytes(orjson.dumps(llava))
    new = [dialogue(generator, n, f"1000{n:08d}.jpg") for n in range(LLAVAR)]
    (folder / "llavar.json").write_bytes(orjson.dumps(llava + new))
    lrv = [
        {
            "image_id": str(generator.randrange(2_400_000)),
            "question": sentence(generator, 8, 20),
            "answer": f"{sentence(generator, 8, 30)} {number}",
            "task": "negative",
        }
        for number in range(LRV)
    ]
    (folder / "lrv.json").write_bytes(orjson.dumps(lrv))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        # Each in a process of its own: the generator's memory is counted neither as the build's
        # nor as that of one of its workers.
        for work, arguments in ((generate, ()), (measure, (given.workers,))):
            process = spawn.Process(target=work, args=(Path(name), *arguments))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)
        row = json.loads((Path(name) / RESULT).read_text(encoding="utf-8"))
    from benchmarks.measure import report  # torch would count as the build's memory
    from benchmarks.models import RESULTS

    report("build", [row], RESULTS)


def measure(folder: Path, workers: int) -> None:
    """Builds, reads and writes the same files plainly, and leaves the figures in the folder."""
    files = ("llava.json", "lrv.json", "llavar.json")
    sources = [
        {"source": source, "annotations": str(folder / file)}
        for source, file in zip(("llava_instruct", "lrv_instruction", "llavar"), files, strict=True)
    ]
    recipe = parse_recipe(
        {"out": str(folder / "build"), "sources": sources, "images": False,
         "deduplicate": False, "workers": workers},
        "benchmark",
    )  # fmt: skip
    start = time.perf_counter()
    result = build_recipe(recipe)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    start = time.perf_counter()
    for file in files:
        (folder / f"plain-{file}").write_bytes(
            orjson.dumps(orjson.loads((folder / file).read_bytes()))
        )
    plain = time.perf_counter() - start
    size = sum((folder / file).stat().st_size for file in files)
    row = {
        "conversations": result.conversations, "read": result.read, "MB": size // 10**6,
        "seconds": seconds, "plain s": plain, "x plain": seconds / plain, "peak GiB": peak,
        "largest worker GiB": child, "workers": workers,
    }  # fmt: skip
    (folder / RESULT).write_text(json.dumps(row), encoding="utf-8")


if __name__ == "__main__":
    main()
