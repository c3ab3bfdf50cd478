"""Short-answer benchmarks: VQAv2, OKVQA, TextVQA, OCR-VQA, GQA, VizWiz, TDIUC.

All are asked with the released "Short answer:" prompt, greedily. The authors never published their
evaluation prompts (THUDM/CogVLM issues 76 and 384), so that is what the released VQA template says,
and the report repeats it. No OCR tokens and no hints are added to a question.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.metrics.exact import (
    exact_match,
    gqa_answer,
    gqa_match,
    lower_match,
)
from cogvlm_sft.evaluation.metrics.intervals import Figure, mean_of, mean_within
from cogvlm_sft.evaluation.metrics.types import mean_per_type
from cogvlm_sft.evaluation.metrics.vqa import Normalization, vqa_accuracy
from cogvlm_sft.evaluation.tasks import published
from cogvlm_sft.evaluation.tasks.task import (
    Pictures,
    Question,
    Scores,
    Task,
    answers_of,
    field_of,
    load_json,
    one_file,
    rows_with,
    texts_of,
)

_PROMPT = "released VQA template: Question: {question} Short answer:"
_TOKENS = 16


def _joined(paths: Sequence[Path], images: Path) -> list[Question]:
    """Questions and answers in VQA's two files; answers may be hidden."""
    asked: dict[Any, dict[str, Any]] = {}
    answered: dict[Any, dict[str, Any]] = {}
    subset = ""
    for path in paths:
        content = load_json(path, dict)
        kind = "questions" if "questions" in content else "annotations"
        for record in field_of(content, kind, str(path), list):
            key = field_of(record, "question_id", str(path), int, str)
            (asked if kind == "questions" else answered)[key] = record
        subset = subset or _subset(content, path)
    if not asked:
        raise DataError(f"{paths[0]}: holds no questions; give the question file as well")
    pictures = Pictures(images)
    questions = []
    for key, record in asked.items():
        where = f"question {key}"
        number = field_of(record, "image_id", where, int)
        answer = answered.get(key)
        if answered and answer is None:
            raise DataError(f"{where}: stands in the question file alone; files of two splits?")
        humans = answers_of(answer, where)
        kind = "question_type" if len(humans or ()) == 1 else "answer_type"
        questions.append(
            Question(
                id=str(key),
                images=(pictures.find(f"COCO_{subset}_{number:012d}.jpg", str(number),
                                      where=where),),
                text=field_of(record, "question", where, str),
                style="vqa",
                truth=humans,
                shown=_most_common(humans) if humans else "",
                group=str((answer or {}).get(kind) or ""),
                upload={"question_id": key},
            )
        )  # fmt: skip
    return questions


def _subset(content: dict[str, Any], path: Path) -> str:
    """The part of COCO that the pictures are of; those of test-dev2015 are called test2015."""
    named = content.get("data_subtype") or path.name
    found = re.search(r"(train|val|test)(?:-dev)?(20\d\d)", str(named))
    return "".join(found.groups()) if found else "val2014"


def _textvqa(paths: Sequence[Path], images: Path) -> list[Question]:
    path = one_file(paths, "textvqa")
    pictures = Pictures(images)
    questions = []
    for record in field_of(load_json(path), "data", str(path), list):
        where = f"question {field_of(record, 'question_id', str(path), int, str)}"
        name = f"{field_of(record, 'image_id', where, str)}.jpg"
        humans = answers_of(record, where)
        questions.append(
            Question(
                id=str(record["question_id"]),
                images=(pictures.find(name, where=where),),
                text=field_of(record, "question", where, str),
                style="vqa",
                truth=humans,
                shown=_most_common(humans) if humans else "",
                upload={"question_id": record["question_id"]},
            )
        )
    return questions


def _vizwiz(paths: Sequence[Path], images: Path) -> list[Question]:
    path = one_file(paths, "vizwiz")
    pictures = Pictures(images)
    questions = []
    for record in load_json(path, list):
        name = field_of(record, "image", str(path), str)
        humans = answers_of(record, name)
        questions.append(
            Question(
                id=name,
                images=(pictures.find(name, where=name),),
                text=field_of(record, "question", name, str),
                style="vqa",
                truth=humans,
                shown=_most_common(humans) if humans else "",
                group=str(record.get("answer_type") or ""),
                upload={"image": name},
            )
        )
    return questions


def _ocrvqa(paths: Sequence[Path], images: Path) -> list[Question]:
    """The test part (split 3) of dataset.json."""
    path = one_file(paths, "ocrvqa")
    pictures = Pictures(images)
    questions = []
    for key, book in load_json(path, dict).items():
        if field_of(book, "split", key) != 3:
            continue
        ending = Path(field_of(book, "imageURL", key, str)).suffix
        file = pictures.find(f"{key}{ending}", f"{key}.jpg", where=key)
        texts, truths = texts_of(book, "questions", key), texts_of(book, "answers", key)
        if len(texts) != len(truths):
            raise DataError(f"{key}: {len(texts)} questions and {len(truths)} answers")
        for index, (asked, answer) in enumerate(zip(texts, truths, strict=True)):
            identity = f"{key}#{index}"
            questions.append(
                Question(identity, (file,), asked, "vqa", answer, answer,
                         upload={"question_id": identity})
            )  # fmt: skip
    if not questions:
        raise DataError(f"{path}: no book of the test part (split 3)")
    return questions


def _gqa(paths: Sequence[Path], images: Path) -> list[Question]:
    path = one_file(paths, "gqa")
    pictures = Pictures(images)
    questions = []
    for key, record in load_json(path, dict).items():
        name = f"{field_of(record, 'imageId', key, str)}.jpg"
        asked = field_of(record, "question", key, str)
        answer = field_of(record, "answer", key, str) if record.get("answer") else None
        kinds = record.get("types") or {}
        questions.append(
            Question(key, (pictures.find(name, where=key),), asked, "vqa", answer, answer or "",
                     str(field_of(kinds, "structural", key) or "") if kinds else "",
                     {"questionId": key})
        )  # fmt: skip
    return questions


def _gqa_rows(questions: Sequence[Question], answers: Sequence[str]) -> list[dict[str, Any]]:
    """GQA's own script compares with ==, so the answers are normalised as for our figure."""
    return rows_with("prediction")(questions, [gqa_answer(answer) for answer in answers])


def _soft(
    normalization: Normalization,
) -> Callable[[Sequence[Question], Sequence[str]], Scores]:
    def score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        each = [
            vqa_accuracy(answer, question.truth, normalization)
            for question, answer in zip(questions, answers, strict=True)
        ]
        return Scores([Figure("accuracy", mean_of(each)), *_by_group(questions, each)], each)

    return score


def _hard(
    same: Callable[[str, str], bool],
) -> Callable[[Sequence[Question], Sequence[str]], Scores]:
    def score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        each = [
            float(same(answer, question.truth))
            for question, answer in zip(questions, answers, strict=True)
        ]
        return Scores([Figure("accuracy", mean_of(each)), *_by_group(questions, each)], each)

    return score


def _tdiuc(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    truths = [question.truth[0] for question in questions]
    each = [float(exact_match(a, truth)) for a, truth in zip(answers, truths, strict=True)]
    kinds = [question.group for question in questions]
    figures = [
        Figure("accuracy", mean_of(each)),
        Figure("arithmetic mean per type", mean_per_type(each, kinds, harmonic=False)),
        Figure("harmonic mean per type", mean_per_type(each, kinds, harmonic=True)),
        Figure(
            "arithmetic mean per type, normalised",
            mean_per_type(each, kinds, harmonic=False, answers=truths),
        ),
        Figure(
            "harmonic mean per type, normalised",
            mean_per_type(each, kinds, harmonic=True, answers=truths),
        ),
        *_by_group(questions, each),
    ]
    return Scores(figures, each)


def _by_group(questions: Sequence[Question], each: Sequence[float]) -> list[Figure]:
    groups = [question.group for question in questions]
    names = sorted(set(groups) - {""})
    if len(names) < 2:
        return []
    return [Figure(f"accuracy, {name}", mean_within(each, groups, name)) for name in names]


def _most_common(humans: Sequence[str]) -> str:
    """The commonest answer; the first on ties."""
    return max(humans, key=humans.count)


_TEN = "mean over ten leave-one-out subsets of min(1, equal humans / 3), visualqa.org's scorer"
_CLEANED = (
    "visualqa.org's cleaning of case, punctuation, articles and number words, applied only where "
    "the ten human answers differ"
)

TASKS = (
    Task(
        "vqav2", "VQAv2", "question file and, for val, annotation file", _joined, _PROMPT,
        _CLEANED, _TEN, _soft("official"), _TOKENS, published=published.VQAV2,
        upload_name="vqav2_results.json", upload=rows_with("answer"),
    ),
    Task(
        "okvqa", "OK-VQA", "question file and annotation file (v1.1)", _joined, _PROMPT,
        _CLEANED + "; no stemming", _TEN + " on the ten listed answers (five people, each twice)",
        _soft("official"), _TOKENS, published=published.OKVQA,
        upload_name="okvqa_results.json", upload=rows_with("answer"),
    ),
    Task(
        "textvqa", "TextVQA", "TextVQA_0.5.1_val.json or _test.json", _textvqa,
        _PROMPT + "; no OCR tokens", "m4c's EvalAI cleaning, always applied",
        "the ten-subset VQA accuracy, m4c evaluator", _soft("evalai"), _TOKENS,
        published=published.TEXTVQA,
        upload_name="textvqa_results.json", upload=rows_with("answer"),
    ),
    Task(
        "ocrvqa", "OCR-VQA (test part)", "dataset.json", _ocrvqa, _PROMPT,
        "lower case, ends stripped", "exact match", _hard(lower_match), 32,
        published=published.OCRVQA,
        upload_name="ocrvqa_results.json", upload=rows_with("answer"),
    ),
    Task(
        "gqa", "GQA", "testdev_balanced_questions.json", _gqa, _PROMPT,
        "final full stops and case removed", "exact match", _hard(gqa_match), _TOKENS,
        published=published.GQA,
        upload_name="gqa_results.json", upload=_gqa_rows,
    ),
    Task(
        "vizwiz", "VizWiz", "Annotations/val.json or test.json", _vizwiz,
        _PROMPT + "; nothing said about unanswerable questions",
        _CLEANED + '; "unanswerable" is an answer like others', _TEN, _soft("official"), _TOKENS,
        published=published.VIZWIZ,
        upload_name="vizwiz_results.json", upload=rows_with("answer"),
    ),
    Task(
        "tdiuc", "TDIUC", "OpenEnded_mscoco_val2014_questions.json and mscoco_val2014_annotations"
        ".json of TDIUC", _joined, _PROMPT, "case, ends and a final full stop removed",
        "accuracy, and arithmetic and harmonic mean over the twelve question types, plain and "
        "normalised by answer", _tdiuc, _TOKENS,
        upload_name="tdiuc_results.json", upload=rows_with("answer"),
    ),
)  # fmt: skip
