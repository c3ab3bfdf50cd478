"""Ending a run early without losing it.

A run that is told to stop (SIGTERM from a scheduler, SIGINT from a keyboard) finishes its step,
writes a snapshot and ends with 128 + the signal's number, as a shell would say it; a second signal
ends it at once. Launchers and terminals send it to the whole process group; the data workers leave
that, or they would be gone before the step is finished. Where another process of the run is gone,
the next exchange with it fails; that is said in one line, and the run goes on from its last
snapshot when it is started again.
"""

import os
import re
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingStopped(SystemExit):
    """A run was stopped by a signal after it saved a snapshot; exits with 128 + the signal."""

    def __init__(self, signal_number: int, step: int, snapshot: Path) -> None:
        """`step` is the last one that was trained, `snapshot` where the run goes on from."""
        super().__init__(128 + signal_number)
        self.signal_number, self.step, self.snapshot = signal_number, step, snapshot


# How gloo and NCCL say that the other end of a connection is gone.
_GONE = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket closed|remote process exited"
    r"|ncclremoteerror|ncclsystemerror|heartbeat|watchdog caught collective operation timeout",
    re.IGNORECASE,
)


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective failed because another process of the run is gone."""
    return isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None


def leave_process_group(worker: int) -> None:
    """Set up data worker `worker`: signals to the run's process group no longer reach it.

    It ends when its parent does, which it looks after itself.
    """
    os.setsid()


class StopOnSignal(TrainerCallback):
    """Turns SIGTERM and SIGINT into: finish the step, save, stop.

    transformers' own handling saves, trains one step more and returns as if the run were complete;
    with several processes each acts on its own clock. Here the processes agree after every step.
    """

    def __init__(self) -> None:
        """Handlers are installed from the start of training to its end."""
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Install the handlers; Python allows it in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.restore()
        said = f"{signal.Signals(number).name}: saving a snapshot after this step, then stopping"
        # Not by print: the signal may have come amid a line of the progress bar.
        os.write(2, f"\n{said}\n".encode())

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """All processes stop at the same step, or none."""
        if distributed.is_available() and distributed.is_initialized():
            flag = torch.tensor(self.received or 0, device=args.device)
            distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
            self.received = int(flag.item()) or None
        if self.received is not None:
            control.should_save = control.should_log = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Training is over, finished or stopped."""
        self.restore()
