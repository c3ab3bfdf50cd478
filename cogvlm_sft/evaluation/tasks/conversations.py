"""Our own records: held-out conversations, judged by exact match or by boxes, and plain text.

Every assistant turn of a conversation is one question, asked with the true earlier turns as its
history, in the conversation's own prompt style. `text_exact_match` asks questions about nothing but
text in Vicuna's prompt, to show what a training did to the language model.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cogvlm_sft.conversation import (
    IMAGE_MARKER,
    Conversation,
    read_conversations,
    resolve_image,
)
from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.metrics.boxes import box_match
from cogvlm_sft.evaluation.metrics.exact import exact_match
from cogvlm_sft.evaluation.metrics.intervals import Figure, mean_of
from cogvlm_sft.evaluation.tasks.task import (
    Question,
    Scores,
    Task,
    field_of,
    load_json_lines,
    one_file,
)


def _read(paths: Sequence[Path], images: Path) -> list[Question]:
    return [
        question
        for path in paths
        for conversation in read_conversations(path)
        for question in _rounds(conversation, images)
    ]


def _rounds(conversation: Conversation, image_root: Path) -> Iterator[Question]:
    images = [resolve_image(image_root, path, conversation.id) for path in conversation.images]
    history: list[tuple[str, str]] = []
    shown = 0
    for number, (asked, answered) in enumerate(conversation.rounds()):
        shown += asked.content.count(IMAGE_MARKER)
        # The marker stays: the picture stands where training put it, before its own round.
        text, answer = asked.content.strip(), answered.content.strip()
        if answered.train:
            yield Question(
                id=f"{conversation.id}#{number}",
                images=tuple(images[:shown]),
                text=text,
                style=conversation.style,
                truth=answer,
                shown=answer,
                history=tuple(history),
            )
        history.append((text, answer))


def _plain(paths: Sequence[Path], images: Path) -> list[Question]:
    path = one_file(paths, "text_exact_match")
    questions = []
    for number, row in enumerate(load_json_lines(path), start=1):
        where = f"{path}:{number}"
        answer = str(field_of(row, "answer", where))
        asked = str(field_of(row, "question", where))
        questions.append(Question(f"line {number}", (), asked, "text", answer, answer))
    return questions


def _judged_by(
    judge: Callable[[str, str], bool], name: str
) -> Callable[[Sequence[Question], Sequence[str]], Scores]:
    def score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        each = []
        for question, answer in zip(questions, answers, strict=True):
            try:
                each.append(float(judge(answer, question.truth)))
            except ValueError as error:
                raise DataError(f"{question.id}: {error}") from None
        return Scores([Figure(name, mean_of(each))], each)

    return score


_BUILD = "build folder or JSON Lines file of conversations"
_OWN = "the conversation's own style, its true earlier turns as history"

TASKS = (
    Task(
        "exact_match", "Held-out conversations", _BUILD, _read, _OWN,
        "ends, doubled spaces, case and one final full stop removed", "accuracy, exact match",
        _judged_by(exact_match, "accuracy"), 32,
    ),
    Task(
        "box_iou", "Held-out boxes", _BUILD, _read, _OWN,
        "all [[...]] boxes of the answer merged into one", "accuracy, IoU > 0.5",
        _judged_by(box_match, "accuracy"), 48,
    ),
    Task(
        "text_exact_match", "Questions without a picture",
        'JSON Lines of {"question": ..., "answer": ...}', _plain,
        "Vicuna's prompt, no picture", "ends, doubled spaces, case and one final full stop removed",
        "accuracy, exact match", _judged_by(exact_match, "accuracy"), 32,
    ),
)  # fmt: skip
