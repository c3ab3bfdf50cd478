"""Questions a second that the evaluation answers, one at a time and eight at once.

    python benchmarks/evaluation.py runs/demo/chat runs/demo/data/heldout_digits runs/demo/images

The answers of both are compared: batching must not change one. Figures depend on the machine, the
checkpoint and the length of answers; docs/evaluation.md says where its own come from.
"""

import argparse
import statistics
import time
from pathlib import Path

from cogvlm_sft.checkpoint.load import load_processor
from cogvlm_sft.evaluation.generate import Request, generate_answers
from cogvlm_sft.evaluation.loading import open_model
from cogvlm_sft.evaluation.tasks import find_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parsed = parser.parse_args()
    model = open_model(parsed.checkpoint)
    processor = load_processor(parsed.checkpoint)
    task = find_task("exact_match")
    questions = task.read([parsed.annotations], parsed.images)[: parsed.questions]
    requests = [Request(q.images, q.text, q.style, q.history) for q in questions]
    said = {}
    for size in (1, 8):
        rates = []
        for _ in range(parsed.repeats + 1):  # the first one warms up
            clock = time.perf_counter()
            said[size] = generate_answers(
                model, processor, requests, batch_size=size, max_new_tokens=task.max_new_tokens
            )
            rates.append(len(requests) / (time.perf_counter() - clock))
        print(f"batch {size}: {statistics.median(rates[1:]):.1f} questions/s")
    print("same answers" if said[1] == said[8] else "THE ANSWERS DIFFER")


if __name__ == "__main__":
    main()
