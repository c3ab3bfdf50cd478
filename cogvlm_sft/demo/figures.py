"""The demo's two pictures: the loss of both stages, and answers beside the pictures they are about.

Notable choice: matplotlib's Agg canvas is used directly, so that nothing asks for a display and no
global state of pyplot is touched.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

_BOX = re.compile(r"\[\[(\d{3}),(\d{3}),(\d{3}),(\d{3})\]\]")
_RIGHT, _WRONG = "#1a7f37", "#cf222e"


def draw_curves(home: Path) -> Path:
    """Training loss of the two stages, one after the other.

    Args:
        home: The demo's folder; reads `pretrain/` and `chat/metrics.jsonl`.

    Returns:
        `loss.png` in it.
    """
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    offset = 0
    for stage in ("pretrain", "chat"):
        lines = (home / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if "loss" in row]
        steps = [offset + row["step"] for row in rows]
        axes.plot(steps, [row["loss"] for row in rows], label=stage)
        offset = steps[-1] if steps else offset
    axes.set(xlabel="step", ylabel="loss per supervised token", title="cogvlm-sft demo")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(home / "loss.png")
    return home / "loss.png"


def draw_answers(home: Path, results: Mapping[str, Mapping[str, Any]]) -> Path:
    """A column of pictures a task, the first answers above them, right ones green, boxes drawn.

    Args:
        home: The demo's folder.
        results: Task to what `evaluate_model` returned, with its `samples`.

    Returns:
        `answers.png` in it.
    """
    rows = max(len(result["samples"]) for result in results.values())
    figure = Figure(figsize=(2.4 * len(results), 2.8 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, len(results), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for column, result in zip(grid.T, results.values(), strict=True):
        for axes, sample in zip(column, result["samples"], strict=False):
            with Image.open(sample["images"][0]) as picture:
                axes.imshow(picture.convert("RGB"), extent=(0, 1000, 1000, 0))
            color = _RIGHT if sample["score"] == 1.0 else _WRONG
            if found := _BOX.search(sample["prediction"]):
                x0, y0, x1, y1 = map(int, found.groups())
                axes.add_patch(
                    Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white", lw=2.5)
                )
            # A dollar sign would begin a formula.
            answer = sample["prediction"].replace("$", r"\$")
            axes.set_title(f"{sample['question']}\n{answer}", fontsize=9, color=color)
    figure.savefig(home / "answers.png")
    return home / "answers.png"
