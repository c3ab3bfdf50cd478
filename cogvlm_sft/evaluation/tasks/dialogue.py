"""Hallucination and open answers: POPE, MM-Vet and LLaVA-Bench (in the wild).

POPE is scored here, by its official script's rules. The other two need a judge, which is a model of
someone else's whose version moves scores by more than ten points: this module writes answers in the
format that the official graders read, and takes a judge as a callable
(`evaluate_model(..., judge=...)`). Their questions go in unchanged; MM-Vet with beam search, as the
authors advise (THUDM/CogVLM issue 230).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvlm_sft.evaluation.metrics.exact import pope_answer
from cogvlm_sft.evaluation.metrics.intervals import Figure, Statistic
from cogvlm_sft.evaluation.tasks import published
from cogvlm_sft.evaluation.tasks.task import (
    Pictures,
    Question,
    Scores,
    Task,
    field_of,
    load_json,
    load_json_lines,
    one_file,
    rows_with,
    texts_of,
)


def _pope(paths: Sequence[Path], images: Path) -> list[Question]:
    """One or several of the files coco_pope_{random,popular,adversarial}.json."""
    pictures = Pictures(images)
    questions = []
    for path in paths:
        kind = path.stem.rpartition("_")[2]
        for row in load_json_lines(path):
            identity = field_of(row, "question_id", path.name, int, str)
            where = f"{path.name}: question {identity}"
            name, text, label = (field_of(row, k, where, str) for k in ("image", "text", "label"))
            questions.append(
                Question(
                    id=f"{kind}:{identity}",
                    images=(pictures.find(name, where=where),),
                    text=text,
                    style="vqa",
                    truth=label,
                    shown=label,
                    group=kind,
                    upload={"question": text},
                )
            )
    return questions


def _pope_score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    said = np.array([pope_answer(answer) == "yes" for answer in answers])
    true = np.array([question.truth == "yes" for question in questions])
    kinds = [question.group for question in questions]
    names = sorted(set(kinds))
    figures = [
        Figure("F1", _mean_over(kinds, names, _f1(said, true))),
        Figure("accuracy", _mean_over(kinds, names, _share(said == true))),
    ]
    for name in names:
        inside = np.array([kind == name for kind in kinds])
        for label, statistic in (
            ("F1", _f1(said, true)),
            ("accuracy", _share(said == true)),
            ("precision", _ratio(said & true, said)),
            ("recall", _ratio(said & true, true)),
            ("yes ratio", _share(said)),
        ):
            figures.append(Figure(f"{label}, {name}", _only(inside, statistic)))
    return Scores(figures, (said == true).astype(float).tolist())


def _share(flags: NDArray[np.bool_]) -> Statistic:
    return lambda chosen: float(flags[chosen].mean()) if chosen.size else float("nan")


def _ratio(hits: NDArray[np.bool_], of: NDArray[np.bool_]) -> Statistic:
    def statistic(chosen: NDArray[np.int64]) -> float:
        total = of[chosen].sum()
        return float(hits[chosen].sum() / total) if total else 0.0

    return statistic


def _f1(said: NDArray[np.bool_], true: NDArray[np.bool_]) -> Statistic:
    precision, recall = _ratio(said & true, said), _ratio(said & true, true)

    def statistic(chosen: NDArray[np.int64]) -> float:
        p, r = precision(chosen), recall(chosen)
        return 2 * p * r / (p + r) if p + r else 0.0

    return statistic


def _only(inside: NDArray[np.bool_], statistic: Statistic) -> Statistic:
    return lambda chosen: statistic(chosen[inside[chosen]])


def _mean_over(kinds: Sequence[str], names: Sequence[str], statistic: Statistic) -> Statistic:
    """The mean of a figure over the kinds of questions, each counting alike."""
    parts = [_only(np.array([kind == name for kind in kinds]), statistic) for name in names]
    return lambda chosen: float(np.mean([part(chosen) for part in parts]))


def _mm_vet(paths: Sequence[Path], images: Path) -> list[Question]:
    pictures = Pictures(images)
    path = one_file(paths, "mm_vet")
    return [
        Question(
            id=key,
            images=(pictures.find(field_of(row, "imagename", key, str), where=key),),
            text=field_of(row, "question", key, str),
            style="chat",
            truth=row.get("answer", ""),
            shown=str(row.get("answer", "")),
            group="+".join(texts_of(row, "capability", key) if "capability" in row else []),
        )
        for key, row in load_json(path, dict).items()
    ]


def _mm_vet_answers(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, str]:
    return {question.id: answer for question, answer in zip(questions, answers, strict=True)}


def _llava_bench(paths: Sequence[Path], images: Path) -> list[Question]:
    pictures = Pictures(images)
    path = one_file(paths, "llava_bench")
    questions = []
    for row in load_json_lines(path):
        identity = field_of(row, "question_id", path.name, int, str)
        where = f"question {identity}"
        name, text = (field_of(row, key, where, str) for key in ("image", "text"))
        questions.append(
            Question(
                id=str(identity),
                images=(pictures.find(name, where=where),),
                text=text,
                style="chat",
                truth="",
                group=str(row.get("category") or ""),
                upload={"question_id": identity, "prompt": text},
            )
        )
    return questions


def _llava_bench_rows(
    questions: Sequence[Question], answers: Sequence[str]
) -> list[dict[str, Any]]:
    rows = rows_with("text")(questions, answers)
    return [
        {**row, "answer_id": f"cogvlm-sft-{row['question_id']}", "model_id": "cogvlm-sft",
         "metadata": {}}
        for row in rows
    ]  # fmt: skip


_JUDGED = "a judge's points over the most points, times 100; model and date belong beside it"

TASKS = (
    Task(
        "pope", "POPE", "one or more of coco_pope_random.json, _popular.json, _adversarial.json",
        _pope, "released VQA template: Question: {question} Short answer:",
        'the first sentence without commas; "No", "not" or "no" among its words is a no, '
        "everything else a yes", "F1, accuracy, precision, recall and yes ratio of each file; F1 "
        "and accuracy also as the mean over files", _pope_score, 16, published=published.POPE,
        upload_name="pope_{group}_answers.jsonl", upload=rows_with("answer"),
    ),
    Task(
        "mm_vet", "MM-Vet", "mm-vet.json", _mm_vet,
        "released chat template: Question: {question} Answer:", "ends stripped", _JUDGED, None,
        512, num_beams=5, published=published.MM_VET,
        upload_name="mm_vet_results.json", upload=_mm_vet_answers,
    ),
    Task(
        "llava_bench", "LLaVA-Bench (in the wild)", "questions.jsonl", _llava_bench,
        "released chat template: Question: {question} Answer:", "ends stripped", _JUDGED, None,
        1024, published=published.LLAVA_BENCH,
        upload_name="llava_bench_answers.jsonl", upload=_llava_bench_rows,
    ),
)  # fmt: skip
