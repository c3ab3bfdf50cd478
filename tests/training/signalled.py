"""`cogvlm-sft train` that sends itself a signal at the end of one step, on every machine the same.

python tests/training/signalled.py STEP SIGNAL RANK RECIPE
"""

import os
import signal
import sys
from typing import Any

from cogvlm_sft.cli import main
from cogvlm_sft.training.stopping import StopOnSignal

if __name__ == "__main__":
    step, name, rank, recipe = sys.argv[1:]
    stop = StopOnSignal.on_step_end

    def signalled(self: StopOnSignal, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        if state.global_step == int(step) and os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), signal.Signals[name])
        return stop(self, args, state, control, **rest)

    StopOnSignal.on_step_end = signalled  # type: ignore[method-assign, assignment]
    raise SystemExit(main(["train", recipe]))
