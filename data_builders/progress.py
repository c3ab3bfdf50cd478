"""Progress bars of a build: how much is done, the rate, and the time left.

A terminal is refreshed twice a second, a log file gets a line now and then. `TQDM_DISABLE=1`
silences them.
"""

import sys
from typing import Any

from tqdm import tqdm


def progress(
    total: int | None, what: str, unit: str, done: int = 0, scale: bool = False, delay: float = 0
) -> Any:
    """A tqdm bar on stderr; to be used in a `with` block.

    Args:
        total: How many units there are; None where that is not known.
        what: What is being done.
        unit: Name of a unit, with a leading blank.
        done: Units that an earlier run has done.
        scale: Whether to print thousands and millions as k and M.
        delay: Seconds before the bar appears; for work that is mostly done before.
    """
    return tqdm(
        total=total, initial=done, desc=what, unit=unit, unit_scale=scale, smoothing=0.1,
        mininterval=0.5 if sys.stderr.isatty() else 10, dynamic_ncols=True, delay=delay,
    )  # fmt: skip
