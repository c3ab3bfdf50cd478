"""What a benchmark is made of: its questions, how they are asked, how answers are scored.

A task states its protocol in words beside the functions that carry it out (prompt, decoding,
post-processing, metric), and the published figures with their source, so that a report never shows
a number without saying how it came about. Two numbers compare only where these lines agree.
"""

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.metrics.intervals import Figure
from data_builders.boxes import look_up_size
from data_builders.images import ImageFinder


@dataclass(frozen=True, slots=True)
class Question:
    """One request of a benchmark and what is known about its answer.

    Attributes:
        id: Unique in the task.
        images: Picture files, at most one in all benchmarks here.
        text: The whole question as the prompt template gets it.
        style: Prompt template: `chat`, `vqa`, `base` or `text`.
        truth: What the scorer compares with; None where the split's answers are hidden.
        shown: The true answer for a person to read.
        group: Domain, split or question type that figures are also given for.
        upload: The fields that name this question in the official prediction file.
        history: Earlier (question, answer) pairs.
    """

    id: str
    images: tuple[Path, ...]
    text: str
    style: str
    truth: Any = None
    shown: str = ""
    group: str = ""
    upload: dict[str, Any] = field(default_factory=dict)
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """What a scorer makes of all answers.

    Attributes:
        figures: The numbers, the one that papers quote first.
        each: One value from 0 (wrong) to 1 (right) for every question, to find the worst cases.
        notes: Sentences to stand beside the figures, such as what could not be computed and why.
    """

    figures: list[Figure]
    each: Sequence[float]
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Published:
    """A figure of others.

    Attributes:
        figure: Name of our figure that it stands beside.
        value: As printed there.
        model: Which model it is.
        source: Where it was printed, and how sure that is.
        protocol: What is known of how it was measured.
    """

    figure: str
    value: float
    model: str
    source: str
    protocol: str


# A judge grades one answer: (points, most points). MM-Vet: (0.0 to 1.0, 1). LLaVA-Bench: (the
# answer's 1 to 10, the reference's 1 to 10).
Judge = Callable[[Question, str], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Task:
    """A benchmark.

    Attributes:
        name: As given to `cogvlm-sft evaluate --task`.
        title: For reports.
        files: Which official files `--annotations` takes.
        read: (annotation files, image folder) -> questions.
        prompt: How a question is put, in words.
        post_processing: What happens to an answer before it is compared, in words.
        metric: What is computed, in words.
        score: The scorer; None where a judge is needed.
        max_new_tokens: Room for an answer.
        num_beams: 1 is greedy.
        published: Figures of others.
        upload_name: File name of the prediction file; empty where no official format exists. With
            `{group}` in it, each group of questions gets a file of its own.
        upload: (questions, answers) -> what is written to it: a list of objects for JSON Lines
            where the name ends in .jsonl, else any JSON value.
    """

    name: str
    title: str
    files: str
    read: Callable[[Sequence[Path], Path], list[Question]]
    prompt: str
    post_processing: str
    metric: str
    score: Callable[[Sequence[Question], Sequence[str]], Scores] | None
    max_new_tokens: int
    num_beams: int = 1
    published: tuple[Published, ...] = ()
    upload_name: str = ""
    upload: Callable[[Sequence[Question], Sequence[str]], Any] | None = None

    @property
    def decoding(self) -> str:
        """The decoding in words."""
        search = f"beam search, {self.num_beams} beams" if self.num_beams > 1 else "greedy"
        return f"{search}, at most {self.max_new_tokens} new tokens"


def judged_scores(
    questions: Sequence[Question], answers: Sequence[str], judge: Judge, name: str
) -> Scores:
    """Points over most points, in percent, as both judged benchmarks count."""
    graded = [judge(question, answer) for question, answer in zip(questions, answers, strict=True)]
    points = np.array([got for got, _ in graded])
    most = np.array([full for _, full in graded])

    def statistic(chosen: NDArray[np.int64]) -> float:
        return float(points[chosen].sum() / most[chosen].sum())

    # LLaVA-Bench counts in points of the reference, which an answer may exceed.
    figures = [Figure(name, statistic, share=False)]
    return Scores(figures, [min(1.0, got / full) if full else 0.0 for got, full in graded])


def rows_with(key: str) -> Callable[[Sequence[Question], Sequence[str]], list[dict[str, Any]]]:
    """An upload of one object a question: its own fields, and the answer under `key`."""

    def upload(questions: Sequence[Question], answers: Sequence[str]) -> list[dict[str, Any]]:
        pairs = zip(questions, answers, strict=True)
        return [{**question.upload, key: answer} for question, answer in pairs]

    return upload


def load_json(path: Path, kind: type | None = None) -> Any:
    """An annotation file.

    Args:
        path: The file.
        kind: What its outermost value must be, dict or list; None takes either.

    Raises:
        DataError: It is missing, is not JSON, or is of another kind.
    """
    try:
        content = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file") from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, kind or (dict, list)):
        raise DataError(f"{path}: holds {_named(type(content))}, expected {_named(kind or dict)}")
    return content


def load_json_lines(path: Path) -> list[Any]:
    """An annotation file of one JSON value a line.

    Raises:
        DataError: It is missing, or a line is not JSON (the line is named).
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(orjson.loads(line))
            except orjson.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from None
    return rows


def one_file(paths: Sequence[Path], task: str) -> Path:
    """The only annotation file.

    Raises:
        DataError: There are several, or none.
    """
    if len(paths) != 1:
        raise DataError(f"task {task} takes one annotation file, found {len(paths)}")
    return paths[0]


class Pictures:
    """Finds the file of each picture that annotations name, whatever the folder and extension.

    Args:
        folder: The image folder; pictures may lie in folders below it.

    Raises:
        DataError: The folder is missing.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"image folder {folder} does not exist; give the pictures' as --images")
        self._folder = folder
        self._finder = ImageFinder(folder, [folder])

    def find(self, *names: str, where: str) -> Path:
        """The file of a picture.

        Args:
            names: Names that it may have, the likeliest first.
            where: What to name in the message.

        Raises:
            DataError: None of them is there.
        """
        for name in names:
            found, reason = self._finder.find(name)
            if found is not None:
                return self._folder / found
        raise DataError(
            f"{where}: picture {names[0]!r} is not below {self._folder} "
            f"({reason.replace('_', ' ')}); give the folder of the pictures as --images"
        )

    def size(self, name: str, where: str) -> tuple[float, float]:
        """Width and height of a picture in pixels, after its EXIF rotation.

        Raises:
            DataError: It cannot be read.
        """
        sides, reason = look_up_size(self._finder, name)
        if sides is None:
            raise DataError(f"{where}: picture {name!r} is not usable: {reason.replace('_', ' ')}")
        return sides


def field_of(record: Any, key: str, where: str, *kinds: type) -> Any:
    """A field that must be there.

    Args:
        record: An object of a file.
        key: The field's name.
        where: What to name in the message.
        kinds: What it may be; anything where none is given.

    Raises:
        DataError: The record is no object, lacks it, or it is of another kind.
    """
    if not isinstance(record, dict) or key not in record:
        raise DataError(f"{where}: no field {key!r}; is this the official file?")
    value = record[key]
    if kinds and type(value) not in kinds:
        expected = " or ".join(map(_named, kinds))
        raise DataError(f"{where}: {key} is {reprlib.repr(value)}, expected {expected}")
    return value


def texts_of(record: Any, key: str, where: str) -> list[str]:
    """A list of texts that must be there.

    Raises:
        DataError: It is missing, or holds something else.
    """
    texts: list[str] = field_of(record, key, where, list)
    if other := [text for text in texts if type(text) is not str]:
        raise DataError(f"{where}: {key} holds {reprlib.repr(other[0])}, expected texts only")
    return texts


def answers_of(record: Any, where: str) -> list[str] | None:
    """What people answered, in a question's `answers`: texts, or objects with an `answer`.

    Returns:
        Their answers; None where they are hidden.

    Raises:
        DataError: They are of another shape.
    """
    if not isinstance(record, dict) or not record.get("answers"):
        return None
    rows = field_of(record, "answers", where, list)
    return [row if type(row) is str else field_of(row, "answer", where, str) for row in rows]


def _named(kind: type) -> str:
    names = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
    return names.get(kind, f"a {kind.__name__}")
