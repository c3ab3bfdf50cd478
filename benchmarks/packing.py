"""Shared pictures against separate rows: k conversations a picture, 258 and 1,227 image tokens.

python -m benchmarks.packing [--rounds N] [--threads N] [--only 258|1227]
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.baseline import baseline_loss
from benchmarks.measure import interleave, report
from benchmarks.models import MEDIUM, RESULTS, build, items_of, padded, shared
from benchmarks.trainer import step, trainer_for

# 1,227 image tokens, as at 490 px, in a model small enough for rows of them.
LONG = {
    **MEDIUM,
    "num_hidden_layers": 4,
    "vision_config": {**MEDIUM["vision_config"], "image_size": 490, "num_positions": 1226},  # type: ignore[dict-item]
}
TEXT, SUPERVISED = 48, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("258", "1227"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for fields, counts in ((MEDIUM, (2, 4, 8)), (LONG, (4, 8))):
        model = build(fields)
        if given.only not in (None, str(model.config.num_image_tokens)):
            continue
        trainer = trainer_for(model)
        for k in counts:
            items = items_of(model.config, (TEXT,) * 8, SUPERVISED, per_picture=k)
            separate, packed = padded(items), shared(model.config, items)

            def baseline() -> None:
                model.zero_grad(set_to_none=True)  # noqa: B023
                baseline_loss(model, separate).backward()  # noqa: B023

            ways = {
                "packed": lambda: step(trainer, packed),  # noqa: B023
                "separate": lambda: step(trainer, separate),  # noqa: B023
            }
            if k == 8 and model.config.num_image_tokens == 258:
                ways["baseline"] = baseline
            losses = [float(step(trainer, batch)) for batch in (packed, separate)]
            times = interleave(ways, given.rounds)
            ratio = times.ratio("separate", "packed")
            row = {
                "image tokens": model.config.num_image_tokens, "k": k,
                "tokens separate / packed": separate["input_ids"].numel()
                / packed["input_ids"].numel(),
                "packed s": times.median("packed"), "separate s": times.median("separate"),
                **{f"x {key}": value for key, value in ratio.items()},
                "x baseline": None, "x baseline cpu": None,
                "loss difference": abs(losses[0] - losses[1]) / losses[1],
            }  # fmt: skip
            if "baseline" in ways:
                over = times.ratio("baseline", "packed")
                row |= {"x baseline": over["wall"], "x baseline cpu": over["cpu"]}
            rows.append(row)
    report("packing", rows, RESULTS)


if __name__ == "__main__":
    main()
