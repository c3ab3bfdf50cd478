"""`cogvlm-sft train` whose process group gets a signal at the end of one step of one process.

So launchers send it, from a process of their own (torch's data workers take one from their parent
for its word to end); and so it comes in the same step on every machine.

python tests/training/signalled.py STEP SIGNAL RANK RECIPE
"""

import os
import signal
import subprocess
import sys
from typing import Any

from cogvlm_sft.cli import main
from cogvlm_sft.training.stopping import StopOnSignal

if __name__ == "__main__":
    step, name, rank, recipe = sys.argv[1:]
    stop = StopOnSignal.on_step_end

    def signalled(self: StopOnSignal, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        if state.global_step == int(step) and os.environ.get("RANK", "0") == rank:
            send = f"import os; os.killpg({os.getpgrp()}, {signal.Signals[name].value})"
            subprocess.run([sys.executable, "-c", send], start_new_session=True, check=True)
        return stop(self, args, state, control, **rest)

    StopOnSignal.on_step_end = signalled  # type: ignore[method-assign, assignment]
    raise SystemExit(main(["train", recipe]))
