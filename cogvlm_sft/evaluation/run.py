"""Scoring a checkpoint on a benchmark: questions in, predictions, upload file and report out.

One call is one task. Started by `torchrun` or `accelerate launch`, the processes share the work,
and the first of them writes the results. Notable choices: answers are appended while they are made
and a restart goes on (`predictions.py`), so that a killed evaluation loses minutes; the task's own
decoding is used and printed, there is no option to change it, since a score under another decoding
is another benchmark.
"""

import gc
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from cogvlm_sft import launch
from cogvlm_sft.checkpoint.load import load_processor
from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.generate import Request, generate_answers
from cogvlm_sft.evaluation.identity import (
    checkpoint_identity,
    questions_identity,
    tokenizer_identity,
)
from cogvlm_sft.evaluation.loading import describe_weights, open_model
from cogvlm_sft.evaluation.perplexity import evaluate_text, read_texts
from cogvlm_sft.evaluation.predictions import Predictions, chunks
from cogvlm_sft.evaluation.processes import wait_for_all
from cogvlm_sft.evaluation.report import write_report
from cogvlm_sft.evaluation.results import report_of, write_upload
from cogvlm_sft.evaluation.tasks import PERPLEXITY, Task, find_task
from cogvlm_sft.evaluation.tasks.task import Judge, Question
from cogvlm_sft.model import CogVLMForCausalLM, CogVLMProcessor
from cogvlm_sft.recipe import EvaluateTask


def evaluate_checkpoint(
    checkpoint: Path | str,
    task: str,
    annotations: Sequence[Path | str],
    images: Path | str | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    output: Path | str | None = None,
    dtype: str | None = None,
    quantize: Literal["nf4"] | None = None,
    tokenizer: Path | str | None = None,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Loads a checkpoint and scores it; see `evaluate_model`.

    Args:
        checkpoint: Checkpoint folder.
        output: Folder of the results; `CHECKPOINT/evaluation/TASK` where it is not given, and
            `TASK_first_LIMIT` with a limit, so that a look does not cost what hours answered.
        dtype, quantize: As in `open_model`.
        tokenizer: Tokenizer folder, where the checkpoint holds none.

    Raises:
        CheckpointError: The checkpoint is missing or incomplete.
        DataError: The task is unknown, or a conversation or picture is not usable.
    """
    # What costs seconds comes first: a large checkpoint takes minutes to load.
    evaluate = _read_task(task, annotations, images, limit, judge)
    processor = load_processor(checkpoint, tokenizer)
    model = open_model(checkpoint, dtype=dtype, quantize=quantize)
    name = task if limit is None else f"{task}_first_{limit}"
    folder = Path(output) if output is not None else Path(checkpoint) / "evaluation" / name
    return evaluate(model, processor, batch_size, folder, checkpoint)


def check_task(task: EvaluateTask) -> None:
    """Reads a recipe's task before hours of training; the first process does, for all.

    Raises:
        DataError: As `evaluate_model`, of the task's name and files.
    """
    if launch.rank() == 0:
        _read_task(task.name, task.annotations, task.images, task.limit)


def evaluate_tasks(
    checkpoint: Path | str,
    tasks: Sequence[EvaluateTask],
    *,
    batch_size: int = 8,
    quantize: Literal["nf4"] | None = None,
) -> Path | None:
    """Scores a checkpoint on a recipe's tasks, loaded once.

    Args:
        checkpoint: Checkpoint folder; its `evaluation` folder gets a folder for each task.
        tasks: The recipe's `evaluate.tasks`.
        batch_size: Questions generated at once.
        quantize: As in `open_model`.

    Returns:
        The page with all tasks; None on processes other than the first.

    Raises:
        DataError, CheckpointError: As `evaluate_checkpoint`.
    """
    gc.collect()  # a training that has just ended left its model in reference cycles
    processor = load_processor(checkpoint)
    model = open_model(checkpoint, quantize=quantize)
    folder = Path(checkpoint) / "evaluation"
    reports = [
        evaluate_model(
            model,
            processor,
            task.name,
            task.annotations,
            task.images,
            limit=task.limit,
            batch_size=batch_size,
            output=folder / f"{number:02d}_{task.name}",
            checkpoint=checkpoint,
        )
        for number, task in enumerate(tasks)
    ]
    return write_report(folder, reports) if reports[0] else None


def evaluate_model(
    model: CogVLMForCausalLM,
    processor: CogVLMProcessor,
    task: str,
    annotations: Sequence[Path | str],
    images: Path | str | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    output: Path | str | None = None,
    judge: Judge | None = None,
    checkpoint: Path | str | None = None,
) -> dict[str, Any]:
    """Answers the questions of a task and scores the answers.

    Args:
        model, processor: Of one checkpoint.
        task: Name in `tasks.TASKS`, or `text_perplexity`.
        annotations: The official annotation files, or a build of ours.
        images: Folder of the pictures; for a build, the image root. Text tasks need none.
        limit: Only the first so many questions; no upload file is written then.
        batch_size: Questions generated at once.
        output: Folder of predictions.jsonl, the upload file, report.json and report.html; nothing
            is written and nothing resumed without it.
        judge: Grades answers of MM-Vet and LLaVA-Bench, which have no figures without it.
        checkpoint: Where the model came from; a restart goes on only for the same.

    Returns:
        The report: task, protocol, count, figures with 95 % intervals, published figures, and
        `samples`, the first three answers. On processes other than the first, an empty one.

    Raises:
        DataError: No questions, or an annotation, picture or text is not usable.
    """
    evaluate = _read_task(task, annotations, images, limit, judge)
    return evaluate(model, processor, batch_size, output, checkpoint)


def _read_task(
    task: str,
    annotations: Sequence[Path | str],
    images: Path | str | None,
    limit: int | None,
    judge: Judge | None = None,
) -> Callable[..., dict[str, Any]]:
    """Reads all files of a task; what it returns asks a model and writes the results.

    Raises:
        DataError: See `evaluate_model`.
    """
    paths = [Path(path) for path in annotations]
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}, expected 1 or more")
    if task == PERPLEXITY:
        return partial(evaluate_text, read_texts(paths)[:limit], paths, limit)
    found = find_task(task)
    if judge is not None and found.score is not None:
        raise DataError(f"task {task} is scored by rules; it takes no judge")
    questions = found.read(paths, Path(images) if images is not None else Path("."))[:limit]
    if not questions:
        raise DataError(f"{', '.join(map(str, paths))}: holds no question; nothing to evaluate")
    _check_unique(questions, paths)
    return partial(_evaluate_questions, found, questions, paths, limit, judge)


def _evaluate_questions(
    found: Task,
    questions: Sequence[Question],
    paths: Sequence[Path],
    limit: int | None,
    judge: Judge | None,
    model: CogVLMForCausalLM,
    processor: CogVLMProcessor,
    batch_size: int,
    output: Path | str | None,
    checkpoint: Path | str | None,
) -> dict[str, Any]:
    """Asks, scores, and writes the results where there is a folder for them."""
    process, processes = launch.rank(), launch.world_size()
    log = None
    if output is not None:
        run = {
            "task": found.name,
            "checkpoint": checkpoint_identity(checkpoint),
            "tokenizer": tokenizer_identity(processor),
            "decoding": found.decoding,
            "weights": describe_weights(model),
            "questions": questions_identity(questions),
        }
        log = Predictions(Path(output), run, process=process)
        if process == 0:
            others = log.prepare()
            said = ""
            if others:
                named = " and ".join(others)
                said = f"starting anew: the answers there were of another run, by its {named}"
            elif there := len(log.known()):
                said = f"going on, {there} of {len(questions)} are there"
            if said:  # not to stdout, where the report goes
                print(f"{found.name}: {said}", file=sys.stderr)
    elif processes > 1:
        raise DataError("several processes share their answers through files; give an output")
    wait_for_all()
    known = log.known() if log is not None else {}
    wait_for_all()  # until all have read what is there; then they add to it
    answers = _answers(
        model, processor, found, questions, batch_size, log, known, process, processes
    )
    wait_for_all()
    if process:
        wait_for_all()  # until the first has written the results
        return {}
    if log is not None:
        known = log.known()
        answers = [known[question.id] for question in questions]
    weights = describe_weights(model)
    report = report_of(found, questions, answers, paths, judge, checkpoint, limit, weights)
    if log is not None:
        log.finish(report.pop("rows"))
        if limit is None and found.upload is not None:
            write_upload(found, questions, answers, log.folder)
        write_report(log.folder, [report])
    else:
        del report["rows"]
    wait_for_all()
    return report


def _check_unique(questions: Sequence[Question], paths: Sequence[Path]) -> None:
    """Answers are kept by the questions' ids."""
    number, identity = next(
        ((n, one) for one, n in Counter(question.id for question in questions).items() if n > 1),
        (1, ""),
    )
    if number > 1:
        raise DataError(
            f"{', '.join(map(str, paths))}: {number} questions have the id {identity!r}, expected "
            "one; is a file given twice, or do two builds name their conversations alike?"
        )


def _answers(
    model: CogVLMForCausalLM,
    processor: CogVLMProcessor,
    task: Task,
    questions: Sequence[Question],
    batch_size: int,
    log: Predictions | None,
    known: dict[str, str],
    process: int,
    processes: int,
) -> list[str]:
    """Answers of this process's share of the open chunks; others stay empty.

    Args:
        known: Answers that are there, the same in all processes.
    """
    answers = [known.get(question.id, "") for question in questions]
    # Dealt out after the finished ones are gone, so that a restart busies all processes.
    unfinished = [
        chunk
        for chunk in chunks(questions, batch_size)
        if any(questions[index].id not in known for index in chunk)
    ]
    mine = unfinished[process::processes]
    with tqdm(
        total=len(questions) if processes == 1 else sum(map(len, mine)),
        initial=len(questions) - sum(map(len, mine)) if processes == 1 else 0,
        desc=task.name,
        unit="question",
        disable=process != 0,
    ) as bar:
        for chunk in mine:
            fresh = generate_answers(
                model,
                processor,
                [_request(questions[index]) for index in chunk],
                batch_size=batch_size,
                max_new_tokens=task.max_new_tokens,
                num_beams=task.num_beams,
                on_batch=bar.update,
            )
            for index, text in zip(chunk, fresh, strict=True):
                answers[index] = text
            if log is not None:
                log.append(
                    (questions[i].id, answers[i]) for i in chunk if questions[i].id not in known
                )
    return answers


def _request(question: Question) -> Request:
    return Request(question.images, question.text, question.style, question.history)
