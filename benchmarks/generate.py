"""Greedy generation: a batch of 8 against one at a time, and 8 questions about one picture.

python -m benchmarks.generate [--rounds N] [--threads N] [--tokens N [N ...]]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from PIL import Image

from benchmarks.measure import interleave, report
from benchmarks.models import MEDIUM, RESULTS, build, processor_for
from cogvlm_sft.evaluation.generate import Request, generate_answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    # The longest answer of the chat, a long sentence, and the few tokens of VQA, where the picture
    # is nearly all of the work.
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 96, 4])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = build(MEDIUM)
    processor = processor_for(model.config)
    words = " ".join(["word"] * 16)
    pictures = [Image.effect_noise((224, 224), 80 + n).convert("RGB") for n in range(8)]
    apart = [Request((picture,), words, "chat") for picture in pictures]
    about_one = [Request((pictures[0],), words, "chat") for _ in pictures]

    def answer(requests: list[Request], batch_size: int, tokens: int) -> Any:
        return generate_answers(
            model, processor, requests, batch_size=batch_size, max_new_tokens=tokens
        )

    rows = []
    for tokens in given.tokens:
        count = tokens
        times = interleave(
            {
                "one at a time": lambda: answer(apart, 1, count),  # noqa: B023
                "batch of 8": lambda: answer(apart, 8, count),  # noqa: B023
                "8 about one picture": lambda: answer(about_one, 8, count),  # noqa: B023
            },
            given.rounds,
        )
        for way in times.wall:
            ratio = times.ratio("one at a time", way)
            rows.append(
                {"new tokens": tokens, "way": way, "seconds": times.median(way),
                 "tokens/s": 8 * tokens / times.median(way),
                 **{f"x {key}": value for key, value in ratio.items()}}
            )  # fmt: skip
    report("generate", rows, RESULTS)


if __name__ == "__main__":
    main()
