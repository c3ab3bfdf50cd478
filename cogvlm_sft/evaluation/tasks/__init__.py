"""The benchmarks, by name."""

import difflib

from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.tasks import (
    captioning,
    choices,
    conversations,
    dialogue,
    grounding,
    vqa,
)
from cogvlm_sft.evaluation.tasks.task import Task

# The one measure without generated answers; `cogvlm_sft.evaluation.perplexity` computes it.
PERPLEXITY = "text_perplexity"

TASKS: dict[str, Task] = {
    task.name: task
    for module in (captioning, vqa, choices, grounding, dialogue, conversations)
    for task in module.TASKS
}


def find_task(name: str) -> Task:
    """A task by name.

    Raises:
        DataError: There is none of that name; the nearest is named.
    """
    if name in TASKS:
        return TASKS[name]
    known = [*TASKS, PERPLEXITY]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"unknown task {name!r}, expected one of {', '.join(known)}{hint}")
