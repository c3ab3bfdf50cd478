"""The loader: pictures a second against bare Pillow, and how long a training step waits for it.

At the demo's model, pictures and batch, and at 224 and 490 px from JPEGs of 1,280 by 960.

python -m benchmarks.loader [--pictures N] [--threads N] [--workers N]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.measure import interleave, report
from benchmarks.models import MEDIUM, RESULTS, build, processor_for
from cogvlm_sft.data.collator import CogVLMCollator
from cogvlm_sft.data.mixture import ConversationDataset
from cogvlm_sft.data.pictures import read_picture
from cogvlm_sft.recipe import load_recipe


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """Photograph-like JPEGs (smooth noise, quality 90) and a conversation about each."""
    generator = np.random.default_rng(0)
    lines = []
    for number in range(count):
        coarse = generator.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size).save(folder / f"{number}.jpg", quality=90)
        lines.append(
            json.dumps(
                {
                    "id": f"b:{number}", "source": "b", "style": "chat",
                    "images": [f"{number}.jpg"], "meta": {},
                    "messages": [
                        {"role": "user", "content": "<image>\n" + "word " * 60},
                        {"role": "assistant", "content": "word " * 40},
                    ],
                }
            )
        )  # fmt: skip
    path = folder / "conversations.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    demo = load_recipe("demo/pretrain")
    assert demo.model.config is not None
    cases: list[tuple[dict[str, Any], tuple[int, int], int]] = [
        (demo.model.config, (56, 56), demo.train.micro_batch_size),
    ]
    for side, patches in ((224, 257), (490, 1226)):
        vision = {**MEDIUM["vision_config"], "image_size": side, "num_positions": patches}  # type: ignore[dict-item]
        cases.append(({**MEDIUM, "vision_config": vision}, (1280, 960), 2))
    for fields, size, batch in cases:
        with tempfile.TemporaryDirectory() as name:
            rows.append(_measure(given, build(fields), size, batch, Path(name)))
    report("loader", rows, RESULTS)


def _measure(
    given: argparse.Namespace, model: Any, size: tuple[int, int], batch_size: int, folder: Path
) -> dict[str, Any]:
    processor = processor_for(model.config)
    side = model.config.vision_config.image_size
    path = write_pictures(folder, given.pictures, size)
    sources = [(path, 1.0)]
    plain = ConversationDataset(sources, processor, folder)
    reduced = ConversationDataset(sources, processor, folder, reduced_decode=True)
    files = [folder / f"{number}.jpg" for number in range(given.pictures)]

    def bare() -> None:
        for file in files:
            with Image.open(file) as image:
                image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)

    everything = list(range(given.pictures))
    times = interleave(
        {
            "pillow": bare,
            "ours": lambda: plain.__getitems__(everything),
            "reduced": lambda: reduced.__getitems__(everything),
        },
        given.rounds,
    )
    grey = [
        np.abs(
            np.asarray(read_picture(file, "").resize((side, side)), dtype=float)
            - np.asarray(read_picture(file, "", side).resize((side, side)), dtype=float)
        ).mean()
        for file in files[:4]
    ]
    steps = 6
    numbers = [n % given.pictures for n in range((steps + 2) * batch_size)]
    loader = DataLoader(
        plain,
        batch_size=batch_size,
        sampler=numbers,
        collate_fn=CogVLMCollator(processor),
        num_workers=given.workers,
    )
    waited = worked = 0.0
    batches = iter(loader)
    next(batches)  # workers start here
    for _ in range(steps):
        started = time.perf_counter()
        batch = next(batches)
        arrived = time.perf_counter()
        model.zero_grad()
        model(**batch, supervised_only=True).loss.backward()
        waited += arrived - started
        worked += time.perf_counter() - arrived
    return {
        "side": side,
        "picture": f"{size[0]} x {size[1]}",
        "batch": batch_size,
        "pillow pictures/s": given.pictures / times.median("pillow"),
        "ours pictures/s": given.pictures / times.median("ours"),
        "ours / pillow cpu": 1 / times.ratio("pillow", "ours")["cpu"],
        "reduced x": times.ratio("ours", "reduced")["wall"],
        "reduced grey levels": float(np.mean(grey)),
        "step s": worked / steps,
        "waits": waited / (waited + worked),
    }


if __name__ == "__main__":
    main()
