"""Each benchmark from its official files: how it asks, what answers score, what it uploads."""

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cogvlm_sft.conversation import read_conversations
from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.tasks import TASKS, captioning, find_task
from cogvlm_sft.evaluation.tasks.task import Question, judged_scores
from data_builders.build import build_recipe
from data_builders.recipe import parse_recipe

from .official_files import make, picture

# Task: the first question as the model gets it, answers to all, and the figures that they earn.
CASES: dict[str, tuple[str, str, list[str], dict[str, float]]] = {
    "nocaps": ("base", "", ["A cat sits on a mat.", ""],
               {"BLEU-1": 36.7879, "CIDEr": 283.1456, "CIDEr, in-domain": 566.2913}),
    "flickr30k": ("base", "", ["A cat."], {"BLEU-1": 100, "ROUGE-L": 100}),
    "coco_captions": ("base", "", ["", ""], {"CIDEr": 0, "ROUGE-L": 0}),
    "textcaps": ("base", "", ["A stop sign.", "A bus to LA."], {"ROUGE-L": 100}),
    "vqav2": ("vqa", "What color is it?", ["Red", "two", "no"], {"accuracy": 66.6667}),
    "okvqa": ("vqa", "What color is it?", ["dark red.", "2", ""], {"accuracy": 63.3333}),
    "textvqa": ("vqa", "What is written?", ["Stop", "samsung"], {"accuracy": 50}),
    "ocrvqa": ("vqa", "Who wrote it?", ["ann lee", "The trees"], {"accuracy": 50}),
    "gqa": ("vqa", "Which room is it?", ["Bedroom.", "yes"],
            {"accuracy": 50, "accuracy, query": 100, "accuracy, verify": 0}),
    "vizwiz": ("vqa", "What is this?", ["basil", "unanswerable"],
               {"accuracy": 100, "accuracy, unanswerable": 100}),
    "tdiuc": ("vqa", "What color is it?", ["red", "3", "yes"],
              {"accuracy": 66.6667, "arithmetic mean per type": 50, "harmonic mean per type": 0}),
    "scienceqa": ("vqa", "Think of size.\nWhich is larger?\nA. cat\nB. whale\n"
                  "Answer with the option's letter from the given choices directly.",
                  ["B", "whale"],
                  {"accuracy": 50, "accuracy, with picture": 100, "accuracy, without picture": 0}),
    "refcoco": ("base", "Where is red thing? answer in [[x0,y0,x1,y1]] format.",
                ["[[000,000,500,500]]", "left", "[[500,000,700,999;800,000,999,500]]"],
                {"accuracy, val": 50, "accuracy, testA": 100}),
    "visual7w_pointing": ("base", "Which thing is red? answer in [[x0,y0,x1,y1]] format.",
                          ["[[050,050,400,400]]"], {"accuracy": 100}),
    "pope": ("vqa", "Is there a cat in the image?", ["Yes", "No", "yes", "yes"],
             {"F1": 83.3333, "accuracy": 75, "F1, random": 100, "precision, adversarial": 50,
              "yes ratio, adversarial": 100}),
    "exact_match": ("chat", "<image>\nWhat digit is this?", ["7", "7.", "8", ""], {"accuracy": 50}),
    "box_iou": ("chat", "<image>\nWhat digit is this?",
                ["[[100,100,500,500]]", "no", "[[110,100,500,500]]", ""], {"accuracy": 50}),
    "text_exact_match": ("text", "Two and two?", ["Four.", "C"], {"accuracy": 50}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR's program takes seconds to start where it is installed."""
    monkeypatch.setattr(captioning, "meteor_counts", _missing)


def _missing(*_: object) -> Any:
    raise DataError("METEOR needs Java")


@pytest.mark.parametrize("name", CASES)
def test_questions_and_scores(name: str, tmp_path: Path) -> None:
    style, asked, answers, expected = CASES[name]
    task = find_task(name)
    questions = task.read(*make(name, tmp_path))
    assert (questions[0].style, questions[0].text) == (style, asked)
    assert len({question.id for question in questions}) == len(questions) == len(answers)
    assert all(path.is_file() for question in questions for path in question.images)
    assert task.score is not None
    scores = task.score(questions, answers)
    everything = np.arange(len(questions))
    found = {figure.name: figure.statistic(everything) * figure.scale for figure in scores.figures}
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-3)
    assert len(scores.each) == len(questions)
    assert all(0 <= value <= 1 for value in scores.each)


def test_meteor_is_a_figure_where_java_is_and_a_note_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = find_task("nocaps")
    questions = task.read(*make("nocaps", tmp_path))
    assert task.score is not None
    answers = ["a cat", "a dog"]
    assert task.score(questions, answers).notes == ["METEOR needs Java; it is not computed."]
    counts = np.array([[6, 6, 3, 3, 2, 2, 3, 3, 1, 1, *[0] * 10, 1, 6, 6]] * 2)
    monkeypatch.setattr(captioning, "meteor_counts", lambda *_: counts)
    scores = task.score(questions, answers)
    found = {figure.name: figure.statistic(np.arange(2)) for figure in scores.figures}
    assert found["METEOR"] == pytest.approx(0.9)
    assert not scores.notes


UPLOADS: dict[str, Any] = {
    "nocaps": [{"image_id": 1, "caption": "x"}, {"image_id": 2, "caption": "x"}],
    "vqav2": [{"question_id": n, "answer": "x"} for n in (1, 2, 3)],
    "textvqa": [{"question_id": 5, "answer": "x"}, {"question_id": 6, "answer": "x"}],
    "gqa": [{"questionId": "201", "prediction": "x"}, {"questionId": "202", "prediction": "x"}],
    "vizwiz": [{"image": "a.jpg", "answer": "x"}, {"image": "b.jpg", "answer": "x"}],
    "scienceqa": {"results": {"7": -1, "8": -1}, "outputs": {"7": "x", "8": "x"}},
    "mm_vet": {"v1_0": "x", "v1_1": "x"},
    "pope": [{"question": f"Is there a {thing} in the image?", "answer": "x"}
             for thing in ("cat", "dog", "cat", "dog")],
    "llava_bench": [{"question_id": 0, "prompt": "Describe it.", "text": "x",
                     "answer_id": "cogvlm-sft-0", "model_id": "cogvlm-sft", "metadata": {}}],
    "visual7w_pointing": [{"qa_id": 21, "answer": "x", "box_id": None}],
}  # fmt: skip


@pytest.mark.parametrize("name", UPLOADS)
def test_upload_formats(name: str, tmp_path: Path) -> None:
    task = find_task(name)
    questions = task.read(*make(name, tmp_path))
    assert task.upload is not None
    assert task.upload(questions, ["x"] * len(questions)) == UPLOADS[name]


def test_gqa_uploads_what_its_script_compares(tmp_path: Path) -> None:
    task = find_task("gqa")
    questions = task.read(*make("gqa", tmp_path))
    assert task.upload is not None
    rows = task.upload(questions, ["Bedroom.", " No"])
    assert [row["prediction"] for row in rows] == ["bedroom", "no"]


@pytest.mark.parametrize("name", ["vqav2", "textvqa"])
def test_empty_lists_of_answers_are_hidden_answers(name: str, tmp_path: Path) -> None:
    files, images = make(name, tmp_path)
    content = json.loads(files[-1].read_text())
    for row in content.get("annotations") or content["data"]:
        row["answers"] = []
    files[-1].write_text(json.dumps(content))
    assert {question.truth for question in find_task(name).read(files, images)} == {None}


def test_pointing_measures_pictures_upright_and_names_a_broken_one(tmp_path: Path) -> None:
    files, images = make("visual7w_pointing", tmp_path)
    task = find_task("visual7w_pointing")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(images / "a.jpg", exif=exif)
    truth = task.read(files, images)[0].truth
    assert (truth["width"], truth["height"]) == (30, 40)
    (images / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"question 21: picture 'a\.jpg' is not usable"):
        task.read(files, images)


@pytest.mark.parametrize(
    ("name", "source", "split"),
    [("scienceqa", "scienceqa", "test"), ("refcoco", "refcoco", "testA"),
     ("visual7w_pointing", "visual7w", "test")],
)  # fmt: skip
def test_builds_train_on_the_prompts_that_are_scored(
    name: str, source: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # RefCOCO is trained on several requests; the first of them is the one that is scored.
    monkeypatch.setattr("data_builders.sources.refcoco.choose", lambda requests, _: requests[0])
    files, images = make(name, tmp_path)
    asked = {question.text for question in find_task(name).read(files, images)}
    if name == "scienceqa":  # problems 8 and 9 show no picture of their own
        files = files[:1]
    build = {"out": str(tmp_path / "built"), "image_root": str(tmp_path), "workers": 1,
             "sources": [{"source": source, "annotations": list(map(str, files)),
                          "images": [str(images)], "splits": [split]}]}  # fmt: skip
    build_recipe(parse_recipe(build, "test"))
    built = {
        one.turns[0].content.removeprefix("<image>\n")
        for one in read_conversations(tmp_path / "built")
    }
    assert built and built <= asked


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_its_files_and_says_its_protocol(name: str, tmp_path: Path) -> None:
    task = find_task(name)
    assert task.read(*make(name, tmp_path))
    assert all((task.title, task.files, task.prompt, task.post_processing, task.metric))
    assert ("beam" in task.decoding) == (name == "mm_vet")
    assert all(one.source and one.protocol for one in task.published)


def test_half_an_overlap_is_a_miss_in_refcoco(tmp_path: Path) -> None:
    task = find_task("refcoco")
    questions = task.read(*make("refcoco", tmp_path))[:1]
    assert task.score is not None
    # The true box is 20 x 15 pixels of 40 x 30; half of it, and a little more.
    assert task.score(questions, ["[[000,000,250,500]]"]).each == [0.0]
    assert task.score(questions, ["[[000,000,251,500]]"]).each == [1.0]


def test_hidden_answers_leave_no_truth(tmp_path: Path) -> None:
    files, images = make("vqav2", tmp_path)
    questions = find_task("vqav2").read(files[:1], images)
    assert [question.truth for question in questions] == [None] * 3


@pytest.mark.parametrize(
    ("task", "file", "content"),
    [
        ("vqav2", "v2_OpenEnded_mscoco_test-dev2015_questions.json",
         {"data_subtype": "test-dev2015",
          "questions": [{"image_id": 42, "question": "What?", "question_id": 1}]}),
        ("nocaps", "nocaps_test_image_info.json",
         {"images": [{"id": 0, "file_name": "COCO_test2015_000000000042.jpg"}]}),
        ("coco_captions", "image_info_test2014.json",
         {"images": [{"id": 42, "file_name": "COCO_test2015_000000000042.jpg"}],
          "categories": []}),
        ("textcaps", "TextCaps_0.1_test.json",
         {"data": [{"image_id": "COCO_test2015_000000000042"}]}),
        ("vizwiz", "test.json",
         [{"image": "COCO_test2015_000000000042.jpg", "question": "What?"}]),
    ],
)  # fmt: skip
def test_files_of_hidden_test_splits_are_read(
    task: str, file: str, content: Any, tmp_path: Path
) -> None:
    image = picture(tmp_path / "images/COCO_test2015_000000000042.jpg")
    (tmp_path / file).write_text(json.dumps(content))
    (question,) = find_task(task).read([tmp_path / file], image.parent)
    assert (question.images, question.truth) == ((image,), None)


def _places(content: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """Where the values of a JSON tree stand; of a list, its first."""
    for key in content if isinstance(content, dict) else range(len(content[:1])):
        yield (*path, key)
        if isinstance(content[key], dict | list):
            yield from _places(content[key], *path, key)


def _damaged(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy of a JSON tree with another value at a place, or without it (`...`)."""
    copied = copy.deepcopy(content)
    parent = copied
    for key in place[:-1]:
        parent = parent[key]
    if value is ...:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    return copied


@pytest.mark.parametrize("name", [n for n in TASKS if n not in ("exact_match", "box_iou")])
def test_a_damaged_file_is_one_message_or_none(name: str, tmp_path: Path) -> None:
    files, images = make(name, tmp_path)
    task = find_task(name)
    for file in files:
        raw = file.read_bytes()
        if file.suffix == ".p":
            content, write = pickle.loads(raw), pickle.dumps
        elif name in ("pope", "llava_bench", "text_exact_match"):
            content = [json.loads(line) for line in raw.splitlines()]

            def write(rows: Any) -> bytes:
                return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        else:
            content = json.loads(raw)

            def write(rows: Any) -> bytes:
                return json.dumps(rows).encode()

        for place in _places(content):
            for value in (..., None, 7, "x", []):
                file.write_bytes(write(_damaged(content, place, value)))
                try:
                    questions = task.read(files, images)
                except DataError:
                    continue
                # What was read can be scored: not to be found out after hours of answering.
                if task.score and questions and all(one.truth is not None for one in questions):
                    figures = task.score(questions, ["x"] * len(questions)).figures
                    assert all(isinstance(figure.name, str) for figure in figures)
        file.write_bytes(raw)


def test_other_bytes_of_python_2_can_be_asked(tmp_path: Path) -> None:
    files, images = make("refcoco", tmp_path)
    # Python 2's text of bytes, in place of Python 3's.
    written = files[0].read_bytes().replace(b"X\x07\0\0\0the man", b"U\x07caf\xe9 ok")
    files[0].write_bytes(written)
    questions = find_task("refcoco").read(files, images)
    assert questions[2].text == "Where is caf? ok? answer in [[x0,y0,x1,y1]] format."


def test_the_google_split_is_refused(tmp_path: Path) -> None:
    files, images = make("refcocog", tmp_path)
    renamed = files[0].rename(tmp_path / "refs(google).p")
    with pytest.raises(DataError, match="shares pictures between training and validation"):
        find_task("refcocog").read([renamed, files[1]], images)


def test_a_judge_counts_points_over_most_points() -> None:
    questions = [Question(str(n), (), "", "chat") for n in range(2)]
    scores = judged_scores(questions, ["a", "bb"], lambda _, answer: (len(answer), 4), "score")
    assert scores.figures[0].statistic(np.arange(2)) == 3 / 8


def test_telling_shuffles_the_right_option_the_same_way_each_time(tmp_path: Path) -> None:
    files, images = make("visual7w_telling", tmp_path)
    first, again = (find_task("visual7w_telling").read(files, images) for _ in range(2))
    assert first == again
    assert all(question.shown[3:] == "A cat." for question in first)
    assert first[0].text != first[1].text  # two questions that differ by their number alone


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def test_a_pickle_that_asks_for_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, images = make("refcoco", tmp_path)
    files[0].write_bytes(pickle.dumps([_Evil()]))
    with pytest.raises(DataError, match="refused"):
        find_task("refcoco").read(files, images)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("vqav2", "{", "cannot be read as JSON"),
        ("vqav2", '{"x": []}', "no field 'annotations'"),
        ("nocaps", '{"x": []}', "expected images and annotations"),
        ("pope", '{"question_id": 1}\n{', "json:2: not JSON"),
        ("textvqa", '{"data": [{}]}', "no field 'question_id'"),
        ("scienceqa", '{"a": 1}', "problems.json and pid_splits.json"),
    ],
)
def test_files_of_another_shape_are_named(
    name: str, broken: str, message: str, tmp_path: Path
) -> None:
    files, images = make(name, tmp_path)
    files[0].write_text(broken)
    with pytest.raises(DataError, match=message):
        find_task(name).read(files[:1], images)


def test_a_missing_picture_and_an_unknown_task_are_named(tmp_path: Path) -> None:
    files, images = make("textvqa", tmp_path)
    (images / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"question 5: picture 'a\.jpg' is not below"):
        find_task("textvqa").read(files, images)
    with pytest.raises(DataError, match="did you mean 'textvqa'"):
        find_task("textvqaa")
