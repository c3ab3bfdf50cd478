"""Mean per type: TDIUC's answer to data sets in which one kind of question outnumbers the rest.

Arithmetic and harmonic means over the question types (Kafle and Kanan 2017). The harmonic mean is 0
as soon as one type is never right. The normalised means first average over the distinct answers of
a type, so that always saying the commonest answer earns nothing.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cogvlm_sft.evaluation.metrics.intervals import Statistic


def mean_per_type(
    right: Sequence[float], types: Sequence[str], *, harmonic: bool, answers: Sequence[str] = ()
) -> Statistic:
    """Mean over types of the accuracy within each.

    Args:
        right: 1 or 0 for each question.
        types: Question type of each.
        harmonic: Harmonic mean in place of the arithmetic one.
        answers: True answers; with them the accuracy of a type is the mean over its answers.
    """
    values = np.asarray(right, dtype=np.float64)
    cells: dict[tuple[str, str], int] = {}
    cell_of = np.array(
        [
            cells.setdefault((kind, answers[index] if answers else ""), len(cells))
            for index, kind in enumerate(types)
        ]
    )

    def statistic(chosen: NDArray[np.int64]) -> float:
        mine = cell_of[chosen]
        counts = np.bincount(mine, minlength=len(cells))
        sums = np.bincount(mine, weights=values[chosen], minlength=len(cells))
        by_type: dict[str, list[float]] = defaultdict(list)
        for (kind, _), cell in cells.items():
            if counts[cell]:
                by_type[kind].append(sums[cell] / counts[cell])
        means = [sum(inside) / len(inside) for inside in by_type.values()]
        if not harmonic:
            return float(sum(means) / len(means))
        return 0.0 if min(means) == 0 else float(len(means) / sum(1 / mean for mean in means))

    return statistic
