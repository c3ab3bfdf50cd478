"""Watching a run: progress bar, `metrics.jsonl` and the loss curve.

Nothing leaves the machine unless `train.report_to` names a service.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cogvlm_sft.checkpoint.staging import write_text

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"

# What the bar shows of a log besides loss and rate, in this order.
_SPEEDS = {
    "conversations_per_second": ("conv/s", "{:.1f}"),
    "supervised_tokens_per_second": ("supervised tok/s", "{:,.0f}"),
    "image_tokens_per_second": ("image tok/s", "{:,.0f}"),
    "mfu": ("MFU", "{:.1%}"),
    "memory_gib": ("GiB", "{:.1f}"),
}


class LogWindows(TrainerCallback):
    """Logs at every snapshot and at the last step too, so that resuming never splits a mean."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """`should_save` was set before this by transformers' own flow callback."""
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True


class Progress(TrainerCallback):
    """One bar on stderr: steps, time left, loss, rate, and the speeds of the last log."""

    def __init__(self) -> None:
        """The bar is opened when training begins."""
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the bar at the step that a resumed run goes on from."""
        if state.is_world_process_zero:
            terminal = sys.stderr.isatty()
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                unit="step",
                dynamic_ncols=terminal,
                # A log file gets a line now and then, not ten a second.
                mininterval=0.2 if terminal else 10.0,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """One step further."""
        if self._bar is not None:
            self._bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show the figures that matter while waiting."""
        if self._bar is None or not logs:
            return
        shown = {}
        if "loss" in logs:
            shown = {"loss": f"{logs['loss']:.4f}", "rate": f"{logs['learning_rate']:.2e}"}
            for key, (label, form) in _SPEEDS.items():
                if key in logs:
                    shown[label] = form.format(logs[key])
        elif "eval_loss" in logs:
            shown = {"held-out loss": f"{logs['eval_loss']:.4f}"}
        if shown:
            self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Close the bar; also after a failure, so that the message stands on a line of its own."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class MetricsFile(TrainerCallback):
    """Appends every logged figure to `metrics.jsonl`, one JSON object a line.

    A resumed run drops the lines after the snapshot it goes on from, so that each step stands once.
    """

    def __init__(self, path: Path) -> None:
        """`path` is made when the first figure is logged."""
        self.path = path
        self._start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Drop what a killed run logged after its last snapshot."""
        self._start = time.monotonic()
        if state.is_world_process_zero:
            drop_rows_after(self.path, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write a training or held-out figure; transformers' closing summary is left out."""
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        row = {"step": state.global_step, **logs}
        row.pop("epoch", None)  # the sampler knows no epochs
        row["seconds"] = round(time.monotonic() - self._start, 3)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def drop_rows_after(path: Path, step: int) -> None:
    """Leave only the rows up to a step in a metrics file, if there is one."""
    if not path.is_file():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def plot_loss(metrics: Path, picture: Path, title: str) -> Path:
    """Draw the training (and held-out) loss of a metrics file as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("eval_loss", "held-out")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            marker = "o" if len(points) == 1 or key == "eval_loss" else None
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3)
    axes.set(xlabel="step", ylabel="loss per supervised token", title=title)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    figure.savefig(picture)
    return picture
