"""What a task is: how an answer is judged, and how the model is asked.

A task scores one answer at a time; the figure of a run is the mean over all questions. Notable
choice: the prompt is the one that the conversation's own `style` names, so that a task says only
what the released protocol leaves open (the length of an answer and the judge).
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.metrics import box_match, exact_match


@dataclass(frozen=True, slots=True)
class Task:
    """How answers are judged.

    Attributes:
        name: As given to `cogvlm-sft evaluate --task`.
        metric: What the score is called in reports.
        judge: (prediction, true answer) -> right or wrong.
        max_new_tokens: Room for an answer.
    """

    name: str
    metric: str
    judge: Callable[[str, str], bool]
    max_new_tokens: int


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("exact_match", "accuracy, exact match", exact_match, 32),
        Task("box_iou", "accuracy, IoU > 0.5", box_match, 48),
    )
}


def find_task(name: str) -> Task:
    """A task by name.

    Raises:
        DataError: There is none of that name; the nearest is named.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"unknown task {name!r}, expected one of {', '.join(TASKS)}{hint}")
