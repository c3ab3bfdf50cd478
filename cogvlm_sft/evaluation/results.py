"""What a task comes to: its report with figures and worst cases, and its upload file."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cogvlm_sft.checkpoint.staging import write_text
from cogvlm_sft.conversation import strip_marker
from cogvlm_sft.evaluation.metrics.intervals import Figure, value_and_interval
from cogvlm_sft.evaluation.tasks import Task
from cogvlm_sft.evaluation.tasks.task import Judge, Question, judged_scores


def report_of(
    task: Task,
    questions: Sequence[Question],
    answers: Sequence[str],
    annotations: Sequence[Path],
    judge: Judge | None,
    checkpoint: Path | str | None,
    limit: int | None,
    weights: str,
) -> dict[str, Any]:
    """The report of a task, with `rows`, a record of each question, which the caller takes out.

    Args:
        task, questions: What was asked.
        answers: One of each question.
        annotations, checkpoint, limit, weights: Stated in the report.
        judge: Grades the answers that no rule scores.
    """
    scores = None
    if all(question.truth is not None for question in questions):
        if task.score is not None:
            scores = task.score(questions, answers)
        elif judge is not None:
            scores = judged_scores(questions, answers, judge, "score")
    rows = []
    for index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        rows.append(
            {
                "id": question.id,
                "images": [str(path) for path in question.images],
                "question": strip_marker(question.text),
                "answer": question.shown,
                "prediction": answer,
                "group": question.group,
                "score": float(scores.each[index]) if scores is not None else None,
            }
        )
    return {
        "task": task.name,
        "title": task.title,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "annotations": [str(path) for path in annotations],
        "limit": limit,
        "prompt": task.prompt,
        "decoding": task.decoding,
        "weights": weights,
        "post_processing": task.post_processing,
        "metric": task.metric,
        "count": len(questions),
        "figures": figures_of(scores.figures, len(questions)) if scores is not None else [],
        "notes": list(scores.notes) if scores is not None else [],
        "published": [asdict(one) for one in task.published],
        "samples": rows[:3],
        "worst": _worst(rows) if scores is not None else [],
        "rows": rows,
    }


def figures_of(figures: Sequence[Figure], count: int) -> list[dict[str, Any]]:
    """Name, value and 95 % interval of each, in its own unit."""
    rows = []
    # Resampling hundreds of thousands of questions takes seconds a figure.
    for figure in tqdm(figures, desc="intervals", unit="figure", delay=3, leave=False):
        value, (low, high) = value_and_interval(figure.statistic, count)
        scale = figure.scale
        rows.append(
            {
                "name": figure.name,
                "value": value * scale,
                "interval": [low * scale, high * scale],
                "share": figure.share,
            }
        )
    return rows


def _worst(rows: Sequence[dict[str, Any]], count: int = 24) -> list[dict[str, Any]]:
    """The lowest scores; among equals, spread over the whole set by a hash of the id."""

    def rank(row: dict[str, Any]) -> tuple[float, str]:
        return row["score"], hashlib.sha256(row["id"].encode()).hexdigest()

    return sorted((row for row in rows if row["score"] < 1), key=rank)[:count]


def write_upload(
    task: Task, questions: Sequence[Question], answers: Sequence[str], folder: Path
) -> None:
    """The predictions in the official upload format, one file for each name that a task gives."""
    assert task.upload is not None
    parts: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        parts.setdefault(task.upload_name.format(group=question.group), []).append(index)
    for name, chosen in parts.items():
        content = task.upload([questions[i] for i in chosen], [answers[i] for i in chosen])
        if name.endswith(".jsonl"):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        else:
            text = json.dumps(content, ensure_ascii=False) + "\n"
        write_text(folder / name, text)
