"""How the benchmarks measure: interleaved in one process, medians of pairs, wall and CPU time.

The ways that are compared run in turn, so that whatever else the machine does meets all of them;
a ratio is the median over the rounds of the ratio within a round. CPU time is that of the whole
process: less disturbed than the clock where other programs share the cores. The peak of a matrix
product is measured in the same run, a little in every round.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from cogvlm_sft.model.linear_cogvlm import linear

Work = Callable[[], Any]


class Times:
    """Seconds of each way in every round."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    def add(self, name: str, wall: float, cpu: float) -> None:
        """One round of one way."""
        self.wall.setdefault(name, []).append(wall)
        self.cpu.setdefault(name, []).append(cpu)

    def median(self, name: str) -> float:
        """Median seconds of a way."""
        return statistics.median(self.wall[name])

    def ratio(self, slow: str, fast: str) -> dict[str, float]:
        """How many times faster `fast` is: wall, its quartiles, CPU, and best against best."""
        pairs = [a / b for a, b in zip(self.wall[slow], self.wall[fast], strict=True)]
        cpu = [a / b for a, b in zip(self.cpu[slow], self.cpu[fast], strict=True)]
        low, _, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else [pairs[0]] * 3
        return {
            "wall": statistics.median(pairs),
            "low": low,
            "high": high,
            "cpu": statistics.median(cpu),
            "best": min(self.wall[slow]) / min(self.wall[fast]),
        }


def interleave(ways: Mapping[str, Work], rounds: int, warm_up: int = 1) -> Times:
    """Runs every way once a round."""
    times = Times()
    for number in tqdm(range(-warm_up, rounds), unit="round", desc=" / ".join(ways), mininterval=5):
        for name, work in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number >= 0:
                times.add(name, wall, cpu)
    return times


def matmuls(size: int = 2048) -> dict[str, Work]:
    """A square fp32 matrix product, 2 x size ** 3 operations, by torch and as our linears do it."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    return {
        "torch.mm": lambda: torch.mm(left, right, out=out),
        "our linear": lambda: linear(left, right),
    }


def conditions() -> dict[str, Any]:
    """What the figures depend on."""
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of one shape as aligned text."""
    if not rows:
        return ""
    names = list(rows[0])
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join(
        "  ".join(cell.ljust(w) if not i else cell.rjust(w)
                  for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )  # fmt: skip


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def report(name: str, rows: Sequence[Mapping[str, Any]], folder: Path, **more: Any) -> None:
    """Prints the table and writes it, with the conditions, as `<name>.json`."""
    facts = conditions()
    print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    print(table(rows))
    for key, value in more.items():
        print(f"{key}: {_cell(value)}")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"conditions": facts, "rows": list(rows), **more}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
