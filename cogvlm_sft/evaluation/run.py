"""Scoring a checkpoint on conversations that it has not seen.

Every assistant turn of a conversation is one question, asked with the true earlier turns as its
history, in the conversation's own prompt style. Notable choices: answers are greedy; the interval
is a bootstrap over questions; the predictions file is written beside its name and renamed, so that
a file that exists is whole.
"""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cogvlm_sft.checkpoint.load import load_model, load_processor
from cogvlm_sft.conversation import (
    IMAGE_MARKER,
    Conversation,
    read_conversations,
    resolve_image,
    strip_marker,
)
from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.generate import Request, generate_answers
from cogvlm_sft.evaluation.tasks import find_task
from cogvlm_sft.model import CogVLMForCausalLM, CogVLMProcessor

_RESAMPLES = 1000


def evaluate_checkpoint(
    checkpoint: Path | str,
    build: Path | str,
    image_root: Path | str,
    task: str,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    output: Path | str | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Loads a checkpoint and scores it; see `evaluate_model`.

    Raises:
        CheckpointError: The checkpoint is missing or incomplete.
        DataError: The task is unknown, or a conversation or picture is not usable.
    """
    find_task(task)
    model = load_model(checkpoint, dtype=dtype)
    processor = load_processor(checkpoint)
    report = evaluate_model(
        model,
        processor,
        build,
        image_root,
        task,
        limit=limit,
        batch_size=batch_size,
        output=output,
    )
    return {"checkpoint": str(checkpoint), **report}


def evaluate_model(
    model: CogVLMForCausalLM,
    processor: CogVLMProcessor,
    build: Path | str,
    image_root: Path | str,
    task: str,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    output: Path | str | None = None,
) -> dict[str, Any]:
    """Answers the questions of a build and judges them.

    Args:
        build: Build folder, or a JSON Lines file of conversations.
        image_root: What image paths are relative to.
        task: Name in `tasks.TASKS`.
        limit: Only the first so many conversations.
        batch_size: Questions generated at once.
        output: Where to write predictions, one JSON object a line.

    Returns:
        task, metric, data, accuracy (0 to 1), interval (95 %, bootstrap over questions), count,
        and `samples`: the first three predictions.

    Raises:
        DataError: No questions, or a conversation or picture is not usable.
    """
    found = find_task(task)
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}, expected 1 or more")
    questions = list(_questions(Path(build), Path(image_root), limit))
    if not questions:
        raise DataError(f"{build}: holds no conversation; nothing to evaluate")
    with tqdm(total=len(questions), desc=f"{task}: answering", unit="question") as bar:
        answers = generate_answers(
            model,
            processor,
            [request for _, request, _ in questions],
            batch_size=batch_size,
            max_new_tokens=found.max_new_tokens,
            on_batch=bar.update,
        )
    rows: list[dict[str, Any]] = []
    for (identity, request, truth), prediction in zip(questions, answers, strict=True):
        try:
            right = found.judge(prediction, truth)
        except ValueError as error:
            raise DataError(f"{build}: {identity}: {error}") from None
        rows.append(
            {
                "id": identity,
                "images": [str(image) for image in request.images],
                "question": strip_marker(request.question),
                "answer": truth,
                "prediction": prediction,
                "right": right,
            }
        )
    if output is not None:
        _write_rows(Path(output), rows)
    scores = [bool(row["right"]) for row in rows]
    return {
        "task": task,
        "metric": found.metric,
        "data": str(build),
        "accuracy": sum(scores) / len(scores),
        "interval": bootstrap_interval(scores),
        "count": len(scores),
        "samples": rows[:3],
    }


def bootstrap_interval(scores: list[bool], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean, by resampling questions with replacement."""
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(scores, k=len(scores))) / len(scores) for _ in range(_RESAMPLES))
    return means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1]


def _questions(
    build: Path, image_root: Path, limit: int | None
) -> Iterator[tuple[str, Request, str]]:
    for number, conversation in enumerate(read_conversations(build)):
        if limit is not None and number >= limit:
            return
        yield from _rounds(conversation, image_root)


def _rounds(conversation: Conversation, image_root: Path) -> Iterator[tuple[str, Request, str]]:
    images = [resolve_image(image_root, path, conversation.id) for path in conversation.images]
    history: list[tuple[str, str]] = []
    shown = 0
    for number, (asked, answered) in enumerate(conversation.rounds()):
        shown += asked.content.count(IMAGE_MARKER)
        # The marker stays: the picture stands where training put it, before its own round.
        question = asked.content.strip()
        if answered.train:
            yield (
                f"{conversation.id}#{number}",
                Request(
                    images=tuple(images[:shown]),
                    question=question,
                    style=conversation.style,
                    history=tuple(history),
                ),
                answered.content.strip(),
            )
        history.append((question, answered.content.strip()))


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, path)
