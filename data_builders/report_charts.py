"""The figures of the report, as numbers that its template draws: bars, rankings, a map of sizes."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np


def ranking(counts: Counter[str], total: int) -> list[tuple[str, str, float]]:
    """The ten most frequent texts: text, share of all, and length of its bar in per cent.

    Args:
        counts: How often each text occurs.
        total: What shares are of.
    """
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:10]
    return [
        (
            text if len(text) <= 60 else text[:60] + "…",
            f"{100 * n / total:.1f} %" if n * 1000 >= total else "<0.1 %",
            round(100 * n / most[0][1], 1),
        )
        for text, n in most
    ]


def histogram(title: str, values: Any, edges: list[int]) -> dict[str, Any]:
    """Bars with their share of all values, median and 95th percentile.

    Args:
        title: What is counted.
        values: Numbers.
        edges: Where bars begin; the last one is open.
    """
    values = np.asarray(values)
    counts, _ = np.histogram(values, [*edges, np.inf])
    labels = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(edges)]
    top = max(1, int(counts.max()))
    return {
        "title": title,
        "median": f"{np.median(values):,.0f}" if len(values) else "-",
        "most": f"{np.percentile(values, 95):,.0f}" if len(values) else "-",
        "bars": [
            {
                "label": label,
                "count": f"{count:,}",
                "share": _percent(int(count) / max(1, len(values))),
                "height": round(88 * int(count) / top, 2),
            }
            for label, count in zip([*labels, f"{edges[-1]}+"], counts, strict=True)
        ],
    }


def _percent(share: float) -> str:
    if not share:
        return ""
    return "<1 %" if share < 0.005 else f"{100 * share:.0f} %"


def by_count(counts: dict[str, int]) -> list[tuple[str, int]]:
    """The most frequent first."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def size_grid(width: Any, height: Any) -> dict[str, Any]:
    """A map of width against height in steps of a quarter octave, for the page's SVG.

    Args:
        width: Of each picture, pixels.
        height: Of each picture, pixels.
    """
    across, down = np.log2(width) * 4, np.log2(height) * 4
    left, right = int(across.min()) - 1, int(across.max()) + 2
    low, high = int(down.min()) - 1, int(down.max()) + 2
    step_x, step_y = 310 / (right - left), 185 / (high - low)
    cells = Counter(zip(across.astype(int).tolist(), down.astype(int).tolist(), strict=True))
    most = max(cells.values())
    octaves = [2**n for n in range(4, 15)]
    return {
        "cells": [
            {
                "x": round(40 + (x - left) * step_x, 1),
                "y": round(195 - (y + 1 - low) * step_y, 1),
                "w": round(step_x - 1, 1),
                "h": round(step_y - 1, 1),
                "opacity": round(0.15 + 0.85 * (n / most) ** 0.5, 2),
                "title": f"about {2 ** (x / 4 + 0.125):.0f} by {2 ** (y / 4 + 0.125):.0f}: {n:,}",
            }
            for (x, y), n in sorted(cells.items())
        ],
        "x_ticks": [
            (round(40 + (np.log2(size) * 4 - left) * step_x, 1), size)
            for size in octaves
            if left <= np.log2(size) * 4 <= right - 0.5
        ],
        "y_ticks": [
            (round(199 - (np.log2(size) * 4 - low) * step_y, 1), size)
            for size in octaves
            if low <= np.log2(size) * 4 <= high
        ],
    }
