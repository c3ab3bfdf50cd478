"""Multiple choice by letter: ScienceQA and Visual7W telling.

The options stand behind the question as lettered lines and the letter is asked for, as LLaVA
does for ScienceQA (its "hint" stands in front). An answer without a letter is wrong; it is not
matched to an option by its words.
"""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.metrics.exact import option_letter
from cogvlm_sft.evaluation.metrics.intervals import Figure, mean_of, mean_within
from cogvlm_sft.evaluation.tasks import published
from cogvlm_sft.evaluation.tasks.task import (
    Pictures,
    Question,
    Scores,
    Task,
    field_of,
    load_json,
    one_file,
    texts_of,
)
from data_builders.prompts import lettered

_PICTURE, _NO_PICTURE = "with picture", "without picture"


def _scienceqa(paths: Sequence[Path], images: Path) -> list[Question]:
    contents = [load_json(path, dict) for path in paths]
    splits = next((content for content in contents if "test" in content), None)
    problems = next((content for content in contents if "test" not in content), None)
    if splits is None or problems is None:
        raise DataError(
            f"task scienceqa takes problems.json and pid_splits.json, found "
            f"{', '.join(path.name for path in paths)}"
        )
    pictures = Pictures(images)
    questions = []
    for key in field_of(splits, "test", "pid_splits.json", list):
        where = f"problem {key}"
        problem = field_of(problems, str(key), "problems.json", dict)
        files: tuple[Path, ...] = ()
        if problem.get("image"):
            name = field_of(problem, "image", where, str)
            files = (pictures.find(f"test/{key}/{name}", f"{key}/{name}", where=where),)
        options = texts_of(problem, "choices", where)
        right = field_of(problem, "answer", where, int)
        if not 0 <= right < len(options):
            raise DataError(f"{where}: answer is {right}, expected 0 to {len(options) - 1}")
        hint = field_of(problem, "hint", where, str) if problem.get("hint") else ""
        questions.append(
            Question(
                id=str(key),
                images=files,
                text=lettered(field_of(problem, "question", where, str), options, hint),
                style="vqa",
                truth={"letter": chr(ord("A") + right), "options": len(options)},
                shown=f"{chr(ord('A') + right)}. {options[right]}",
                group=_PICTURE if files else _NO_PICTURE,
                upload={"id": key},
            )
        )
    return questions


def visual7w_pairs(content: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(picture, question) pairs of the test part of a Visual7W file.

    Raises:
        DataError: There is none.
    """
    pairs = [
        (picture, pair)
        for picture in field_of(content, "images", "Visual7W", list)
        if field_of(picture, "split", "Visual7W") == "test"
        for pair in field_of(picture, "qa_pairs", "Visual7W", list)
    ]
    if not pairs:
        raise DataError("the Visual7W file holds no picture of the test part")
    return pairs


def _telling(paths: Sequence[Path], images: Path) -> list[Question]:
    pictures = Pictures(images)
    questions = []
    for picture, pair in visual7w_pairs(load_json(one_file(paths, "visual7w_telling"))):
        identity = field_of(pair, "qa_id", "Visual7W", int, str)
        where = f"question {identity}"
        answer = field_of(pair, "answer", where, str)
        options = [answer, *texts_of(pair, "multiple_choices", where)]
        # The file names the right answer first; the order is drawn from the question's own number.
        digest = hashlib.sha256(str(identity).encode()).digest()
        random.Random(digest).shuffle(options)
        right = options.index(answer)
        letter = chr(ord("A") + right)
        name = field_of(picture, "filename", where, str)
        questions.append(
            Question(
                id=str(identity),
                images=(pictures.find(name, where=where),),
                text=lettered(field_of(pair, "question", where, str), options),
                style="vqa",
                truth={"letter": letter, "options": len(options)},
                shown=f"{letter}. {answer}",
                group=str(pair.get("type") or ""),
                upload={"qa_id": identity},
            )
        )
    return questions


def _score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    each = [
        float(option_letter(answer, question.truth["options"]) == question.truth["letter"])
        for question, answer in zip(questions, answers, strict=True)
    ]
    groups = [question.group for question in questions]
    figures = [Figure("accuracy", mean_of(each))]
    if len(set(groups)) > 1:
        figures += [
            Figure(f"accuracy, {name}", mean_within(each, groups, name))
            for name in sorted(set(groups))
        ]
    return Scores(figures, each)


def _scienceqa_results(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """The `results` that ScienceQA's tool reads: option numbers, -1 where none was named."""
    results, outputs = {}, {}
    for question, answer in zip(questions, answers, strict=True):
        letter = option_letter(answer, question.truth["options"])
        results[question.id] = ord(letter) - ord("A") if letter else -1
        outputs[question.id] = answer
    return {"results": results, "outputs": outputs}


_PROMPT = "released VQA template; as the data set's builder writes it: " + " / ".join(
    lettered("{question}", ["…", "…"]).splitlines()
)
_POST = "a lone letter, a leading `X. `, or `The answer is X.`; anything else is wrong"

TASKS = (
    Task(
        "scienceqa", "ScienceQA (test)", "problems.json and pid_splits.json", _scienceqa,
        _PROMPT + "; the hint stands before the question", _POST, "accuracy", _score, 16,
        published=published.SCIENCEQA,
        upload_name="scienceqa_results.json", upload=_scienceqa_results,
    ),
    Task(
        "visual7w_telling", "Visual7W, telling (test)", "dataset_v7w_telling.json", _telling,
        _PROMPT + "; the order of the options is drawn from the question's number", _POST,
        "accuracy", _score, 16,
    ),
)  # fmt: skip
