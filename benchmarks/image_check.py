"""How fast pictures are checked, against bare Pillow: decode rate of one process times cores.

Saves photographs of COCO's usual size, decodes all of them once in this process with nothing but
`Image.open(path).load()`, then checks them as a build does, in one process for each core. The bound
is 0.85 of the bare rate times the cores. Needs a quiet machine and the extra `demo`, whose packages
carry the photographs.

    python -m benchmarks.image_check [--pictures N] [--workers N] [--hashed]
"""

import argparse
import os
import random
import tempfile
import time
from pathlib import Path

from PIL import Image

from data_builders.image_check import ImageLimits
from data_builders.picture_shards import check_images


def save_photographs(folder: Path, count: int) -> list[str]:
    """JPEG files of 640 by 480 pixels and the quality of COCO's, no two alike."""
    # here, since worker processes import this file too
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    generator = random.Random(0)
    names = []
    for number in range(count):
        whole = photographs[number % len(photographs)]
        left, top = generator.randrange(0, 120), generator.randrange(0, 80)
        part = whole.crop((left, top, whole.width - 120 + left, whole.height - 80 + top))
        names.append(f"{number:06d}.jpg")
        part.resize((640, 480)).save(folder / names[-1], quality=92)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=6000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--hashed", action="store_true", help="with perceptual hashes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = save_photographs(folder, given.pictures)
        for path in names[:200]:  # warm: libraries, page cache
            with Image.open(folder / path) as image:
                image.load()
        start = time.perf_counter()
        for path in names:
            with Image.open(folder / path) as image:
                image.load()
        bare = len(names) / (time.perf_counter() - start)
        start = time.perf_counter()
        facts = check_images(folder, names, ImageLimits(), given.hashed, given.workers)
        rate = len(names) / (time.perf_counter() - start)
    assert all(fact.reason is None for fact in facts)
    from benchmarks.measure import report  # worker processes need no torch
    from benchmarks.models import RESULTS

    row = {
        "pictures": len(names), "workers": given.workers, "hashed": given.hashed,
        "bare / s": bare, "checked / s": rate, "of bare x cores": rate / (bare * given.workers),
    }  # fmt: skip
    report("image_check", [row], RESULTS)


if __name__ == "__main__":
    main()
