"""Answers on disk while they are made: appended, resumable, and the same file in the end.

Each process appends to a log of its own; the whole file appears by one rename when every answer is
there. Notable choices: the work is cut into chunks before anything runs (by picture and length, so
that questions about one picture stay together and batches hold little padding) and a chunk is
answered whole or again whole, so that a run that was killed forms the same batches as one that was
not; chunks are dealt out to processes in turn, so their number changes nothing either. What an
earlier run of another checkpoint, task or decoding left behind is recognised and not mixed in.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cogvlm_sft.checkpoint.staging import write_text
from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.tasks.task import Question

_CHUNK_BATCHES = 8
_RUN = "run.json"
_PREDICTIONS = "predictions.jsonl"


class Predictions:
    """The answers of one task in one folder.

    Args:
        folder: Made if missing.
        run: What the answers depend on, as JSON values; another one starts anew.
        process: Number of this process.

    Raises:
        DataError: The folder cannot be written.
    """

    def __init__(self, folder: Path, run: dict[str, Any], *, process: int = 0) -> None:
        self.folder = folder
        self._run = json.loads(json.dumps(run))
        self._log = folder / f"answers-{process:05d}.partial.jsonl"

    def prepare(self) -> list[str]:
        """Makes the folder ready; to be called once, before any process writes.

        Returns:
            In what the run differs whose answers were there and are removed; mostly nothing.

        Raises:
            DataError: The folder is not usable.
            CheckpointError: It cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / _RUN
            known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
            if known == self._run:
                return []
            there = bool(self.known())
            self._clear()
            (self.folder / _PREDICTIONS).unlink(missing_ok=True)
            write_text(file, json.dumps(self._run, indent=2, ensure_ascii=False) + "\n")
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder}: cannot be used for predictions: {error}") from None
        if not there or not isinstance(known, dict):
            return []
        return [key for key in self._run if known.get(key) != self._run[key]]

    def known(self) -> dict[str, str]:
        """Answers so far by question id: of the whole file, and of all processes' logs.

        Both are there where lines were taken out of the whole file, to have them asked again.
        """
        whole = self.folder / _PREDICTIONS
        answers: dict[str, str] = {}
        for file in [*([whole] if whole.is_file() else []), *self._logs()]:
            for line in file.read_bytes().split(b"\n"):
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # half a line of a process that was killed, or the end of the file
                answers[row["id"]] = row["prediction"]
        return answers

    def append(self, answers: Iterable[tuple[str, str]]) -> None:
        """Adds answers to this process's log, and makes sure that they are on the disk."""
        rows = "".join(
            json.dumps({"id": identity, "prediction": text}, ensure_ascii=False) + "\n"
            for identity, text in answers
        )
        with self._log.open("ab") as stream:
            if stream.tell() and not _ends_with_newline(self._log):
                stream.write(b"\n")  # half a line of a killed start must not swallow the next
            stream.write(rows.encode())
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self, rows: Sequence[dict[str, Any]]) -> Path:
        """Writes the whole file and removes the logs."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = write_text(self.folder / _PREDICTIONS, lines)
        self._clear()
        return path

    def _logs(self) -> list[Path]:
        return sorted(self.folder.glob("answers-*.partial.jsonl"))

    def _clear(self) -> None:
        for log in self._logs():
            log.unlink()


def chunks(questions: Sequence[Question], batch_size: int) -> list[list[int]]:
    """Question numbers in the order of work, cut into pieces of several batches.

    Questions about one picture stand together, the longest first, so that memory runs out at the
    start or never.

    Args:
        questions: All of a task.
        batch_size: Questions generated at once.
    """

    def length(index: int) -> int:
        question = questions[index]
        return len(question.text) + sum(len(a) + len(b) for a, b in question.history)

    longest: dict[tuple[Path, ...], int] = {}
    for index, question in enumerate(questions):
        longest[question.images] = max(longest.get(question.images, 0), length(index))
    order = sorted(
        range(len(questions)),
        key=lambda index: (
            -len(questions[index].images),
            -longest[questions[index].images],
            questions[index].images,
            -length(index),
            index,
        ),
    )
    size = batch_size * _CHUNK_BATCHES
    return [order[start : start + size] for start in range(0, len(order), size)]


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
