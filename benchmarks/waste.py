"""What a batch stores and computes for nothing, by the samplers' own report: no model is run.

python -m benchmarks.waste

20,000 conversations of 1,227 or 258 image tokens and a text of log-normal length (median 120, 90 %
between 32 and 450, about LLaVA-Instruct's), one to ten about a picture; steps of 640 in
micro-batches of 8. `stored` is padding in the tensors; linears and attention leave it out, so that
nothing of it is computed. `idle` is what processes wait for the one with the most tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.measure import report
from benchmarks.models import RESULTS
from cogvlm_sft.training.samplers import GlobalBatchSampler, SharedImageSampler


def main() -> None:
    random = np.random.default_rng(0)
    count = 20_000
    texts = np.exp(random.normal(np.log(120), 0.8, count)).clip(8, 800).astype(int)
    pictures = np.repeat(np.arange(count), random.integers(1, 11, count))[:count]
    common: dict[str, Any] = {"steps": 50, "global_batch": 640}
    rows = []
    for image_tokens in (258, 1227):
        lengths = texts + image_tokens + 1
        for processes in (1, 8):
            shape = {**common, "micro_batches": 80, "processes": processes}
            samplers: dict[str, GlobalBatchSampler] = {
                "a step sorted": GlobalBatchSampler(lengths, pictures, **shape),
                "8 steps sorted": GlobalBatchSampler(lengths, pictures, **shape, window=8),
                "pictures shared": SharedImageSampler(
                    lengths, pictures, **shape, image_tokens=image_tokens, budget=1 << 20
                ),
            }
            for name, sampler in samplers.items():
                found = sampler.report()
                rows.append(
                    {"image tokens": image_tokens, "processes": processes, "batches": name,
                     "pictures a step": found.pictures, "tokens a step": int(found.tokens),
                     "largest micro-batch": found.largest, "stored %": 100 * found.padding,
                     "idle %": 100 * found.idle}
                )  # fmt: skip
    report("waste", rows, RESULTS)


if __name__ == "__main__":
    main()
