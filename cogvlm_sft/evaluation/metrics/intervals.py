"""Figures of a run and their 95 % intervals, by resampling questions with replacement.

A figure is a function of question numbers, so that a mean, a corpus BLEU, a harmonic mean over
types and an F1 get their intervals in one way. The seed is fixed: the same answers give the same
interval.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000

Statistic = Callable[[NDArray[np.int64]], float]


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a run.

    Attributes:
        name: As printed.
        statistic: Indices of questions, repeated ones counting again, to the number.
        scale: What the number is multiplied by for print; 100 for shares.
        share: Whether it lies between 0 and 1, so that a bar can show it.
    """

    name: str
    statistic: Statistic
    scale: float = 100.0
    share: bool = True


def mean_of(values: Sequence[float] | NDArray[np.float64]) -> Statistic:
    """The mean of one value a question."""
    array = np.asarray(values, dtype=np.float64)
    return lambda chosen: float(array[chosen].mean())


def mean_within(
    values: Sequence[float] | NDArray[np.float64], groups: Sequence[str], group: str
) -> Statistic:
    """The mean over the questions of one group; NaN where a sample has none of them."""
    array = np.asarray(values, dtype=np.float64)
    inside = np.array([one == group for one in groups])

    def statistic(chosen: NDArray[np.int64]) -> float:
        mine = chosen[inside[chosen]]
        return float(array[mine].mean()) if mine.size else float("nan")

    return statistic


def value_and_interval(
    statistic: Statistic, count: int, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """A figure on all questions, and its 95 % interval.

    Args:
        statistic: See `Figure`.
        count: Number of questions, 1 or more.
        seed: Of the resampling.
    """
    rng = np.random.default_rng(seed)
    value = statistic(np.arange(count))
    drawn = [statistic(rng.integers(0, count, count)) for _ in range(_RESAMPLES)]
    low, high = (
        np.nanpercentile(drawn, [2.5, 97.5]) if not np.all(np.isnan(drawn)) else (value,) * 2
    )
    return value, (float(low), float(high))
