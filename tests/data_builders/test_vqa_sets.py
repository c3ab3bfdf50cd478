"""The academic question sets in their released shapes; held-out splits never enter."""

import pytest

from cogvlm_sft.errors import DataError


def pairs(built):
    return [(r["images"][0] if r["images"] else None, *(m["content"] for m in r["messages"]))
            for r in built]  # fmt: skip


def votes(*answers):
    return [{"answer": a, "answer_confidence": "yes", "answer_id": n + 1}
            for n, a in enumerate(answers)]  # fmt: skip


@pytest.mark.parametrize("source", ["vqav2", "okvqa"])
def test_two_file_sets(source, root, run, write_json, picture):
    picture(root / "train2014" / "COCO_train2014_000000458752.jpg", 1)
    picture(root / "train2017" / "000000000009.jpg", 2)
    questions = {"questions": [
        {"image_id": 458752, "question": "Taken through?", "question_id": 458752000},
        {"image_id": 9, "question": "Majority?", "question_id": 9000},
        {"image_id": 9, "question": "Never answered?", "question_id": 9001},
        {"image_id": 10, "question": "No picture?", "question_id": 10000},
        {"image_id": 9, "question": "Nobody knew?", "question_id": 9003},
    ]}  # fmt: skip
    answers = {"info": {}, "annotations": [
        {"multiple_choice_answer": "net", "answers": votes("net"), "image_id": 458752,
         "question_id": 458752000},
        {"answers": votes("b", "a", "a", "b", "c"), "image_id": 9, "question_id": 9000},
        {"multiple_choice_answer": "x", "image_id": 10, "question_id": 10000},
        {"multiple_choice_answer": "x", "image_id": 9, "question_id": 77},
        {"answers": votes("", " "), "image_id": 9, "question_id": 9003},
    ]}  # fmt: skip
    q = write_json("OpenEnded_mscoco_train2014_questions.json", questions)
    a = write_json("mscoco_train2014_annotations.json", answers)
    report, built, _ = run(source, [a], questions=[str(q)])
    assert pairs(built) == [
        ("train2014/COCO_train2014_000000458752.jpg", "<image>\nTaken through?", "net"),
        ("train2017/000000000009.jpg", "<image>\nMajority?", "b"),
    ]
    assert {r["style"] for r in built} == {"vqa"}
    assert report["read"] == 6
    assert report["dropped"] == {
        "annotation_without_question": 1, "empty_answer": 1, "image_missing": 1,
        "question_without_annotation": 1,
    }  # fmt: skip
    with pytest.raises(DataError, match="no questions given"):
        run(source, [a])
    held = write_json("mscoco_val2014_annotations.json", answers)
    with pytest.raises(DataError, match="held_out_split"):
        run(source, [held], questions=[str(q)])


def test_textvqa(root, run, write_json, picture):
    picture(root / "train_images" / "003a8ae2ef43b901.jpg", 1)
    row = {"question_id": 1, "question": "what brand?", "image_id": "003a8ae2ef43b901",
           "answers": ["nokia"] * 6 + ["nok"] * 4, "set_name": "train"}  # fmt: skip
    rows = [row, row | {"set_name": "val"}, row | {"answers": []}, row | {"image_id": None}, 5]
    report, built, _ = run("textvqa", [write_json("t.json", {"data": rows})])
    assert pairs(built) == [("train_images/003a8ae2ef43b901.jpg", "<image>\nwhat brand?", "nokia")]
    assert report["dropped"] == {
        "empty_answer": 1, "held_out_split": 1, "image_name_missing": 1,
        "record_not_an_object": 1}  # fmt: skip


def test_vizwiz(root, run, write_json, picture):
    picture(root / "VizWiz_train_00000000.jpg", 1)
    picture(root / "VizWiz_val_00000000.jpg", 2)
    row = {"image": "VizWiz_train_00000000.jpg", "question": "What is it?",
           "answers": votes("unanswerable", "unanswerable", "basil"), "answerable": 0}  # fmt: skip
    rows = [row, row | {"image": "VizWiz_val_00000000.jpg"}, row | {"question": None}]
    report, built, _ = run("vizwiz", [write_json("train.json", rows)])
    assert pairs(built) == [
        ("VizWiz_train_00000000.jpg", "<image>\nWhat is it?", "unanswerable")]  # fmt: skip
    assert report["dropped"] == {"empty_question": 1, "held_out_split": 1}


def test_ocr_vqa(root, run, write_json, picture):
    picture(root / "0001.jpg", 1)
    picture(root / "0002.gif", 2)
    entry = {"imageURL": "http://x/a.jpg", "questions": ["Who?", "What?"],
             "answers": ["Ann", "A book"], "title": "t", "split": 1}  # fmt: skip
    content = {
        "0001": entry, "0002": entry | {"imageURL": "http://x/b.gif"}, "0003": entry | {"split": 2},
        "0004": entry | {"answers": ["one"]}, "0005": {"split": 1}, "0006": [], "0007": entry,
    }  # fmt: skip
    report, built, _ = run("ocr_vqa", [write_json("dataset.json", content)])
    assert pairs(built) == [
        ("0001.jpg", "<image>\nWho?", "Ann"), ("0001.jpg", "<image>\nWhat?", "A book"),
        ("0002.gif", "<image>\nWho?", "Ann"), ("0002.gif", "<image>\nWhat?", "A book"),
    ]  # fmt: skip
    assert report["dropped"] == {
        "answer_count_differs": 2, "held_out_split": 2, "image_missing": 2,
        "record_not_an_object": 1, "turns_missing": 1}  # fmt: skip


def test_gqa(root, run, write_json, picture):
    picture(root / "VG_100K" / "n250821.jpg", 1)
    entry = {"question": "Which room is it?", "imageId": "n250821", "answer": "bedroom",
             "fullAnswer": "It is a bedroom."}  # fmt: skip
    content = {"1": entry, "2": entry | {"imageId": "404"}, "3": "x", "4": {"imageId": "n250821"}}
    path = write_json("train_balanced_questions.json", content)
    report, built, _ = run("gqa", [path])
    assert pairs(built) == [("VG_100K/n250821.jpg", "<image>\nWhich room is it?", "bedroom")]
    assert report["dropped"] == {
        "empty_question": 1, "image_missing": 1, "record_not_an_object": 1}  # fmt: skip
    _, built, _ = run("gqa", [path], full_answers=True)
    assert built[0]["messages"][1]["content"] == "It is a bedroom."
    with pytest.raises(DataError, match="3 held_out_split"):
        run("gqa", [write_json("testdev_balanced_questions.json", content)])


def test_scienceqa(root, run, write_json, picture):
    picture(root / "train" / "7" / "image.png", 1)
    entry = {"question": "Which is a solid?", "choices": ["milk", "rock"], "answer": 1, "hint": "",
             "image": "image.png", "split": "train"}  # fmt: skip
    content = {
        "7": entry, "8": entry, "9": entry | {"image": None, "hint": "Think."},
        "10": entry | {"split": "test"}, "11": entry | {"answer": 2}, "12": entry | {"choices": []},
    }  # fmt: skip
    path = write_json("problems.json", content)
    report, built, _ = run("scienceqa", [path])
    ask = "Answer with the option's letter from the given choices directly."
    assert pairs(built) == [
        ("train/7/image.png", f"<image>\nWhich is a solid?\nA. milk\nB. rock\n{ask}", "B"),
    ]  # fmt: skip
    # 8 has no picture of its own: that of 7 has the same name and must not be taken for it
    assert report["dropped"] == {
        "answer_not_among_choices": 1, "choices_missing": 1, "held_out_split": 1,
        "image_missing": 1, "no_picture": 1}  # fmt: skip
    _, built, _ = run("scienceqa", [path], text_only=True)
    assert built[1]["images"] == [] and "\nContext: Think.\n" in built[1]["messages"][0]["content"]
