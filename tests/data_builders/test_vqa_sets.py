"""The academic question sets in their released shapes; held-out splits never enter."""

import pytest

from cogvlm_sft.errors import DataError


def pairs(built):
    return [(r["images"][0] if r["images"] else None, *(m["content"] for m in r["messages"]))
            for r in built]  # fmt: skip


def votes(*answers):
    return [{"answer": a, "answer_confidence": "yes", "answer_id": n + 1}
            for n, a in enumerate(answers)]  # fmt: skip


@pytest.mark.parametrize("source", ["vqav2", "okvqa", "tdiuc"])
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


def test_either_file_may_tell_that_its_records_are_held_out(root, run, write_json, picture):
    picture(root / "COCO_train2014_000000000009.jpg", 1)
    questions = {"questions": [{"image_id": 9, "question": "q", "question_id": 1}]}
    answers = {
        "annotations": [{"image_id": 9, "question_id": 1, "multiple_choice_answer": "a"}, 1e3]
    }
    subtype = {"data_subtype": "val2014"}
    cases = [
        ("a.json", answers, "q_val2014_questions.json", questions),
        ("a.json", answers, "questions.json", subtype | questions),
        ("a.json", answers, "questions.json", questions | subtype),  # behind the array
        ("a.json", answers | subtype, "questions.json", questions),
        ("mscoco_val2014_annotations.json", {"data_subtype": "train2014"} | answers, "q.json",
         questions),
        ("mscoco_train2014_annotations.json", subtype | answers, "q.json", questions),
    ]  # fmt: skip
    for name, content, asking, asked in cases:
        with pytest.raises(DataError, match="1 held_out_split, 1 record_not_an_object"):
            run("vqav2", [write_json(name, content)], questions=str(write_json(asking, asked)))
    paths = [write_json("a.json", answers), write_json("Questions.json", questions)]
    _, built, _ = run("vqav2", paths)  # told apart by their names; neither says that it is held out
    assert pairs(built) == [("COCO_train2014_000000000009.jpg", "<image>\nq", "a")]
    with pytest.raises(DataError, match="no answers given"):
        run("vqav2", paths[1:])


def test_joined_records_that_contradict_each_other(root, run, write_json, picture):
    picture(root / "COCO_train2014_000000000009.jpg", 1)
    questions = {"data_subtype": "train2014", "questions": [
        {"image_id": 9, "question": "Text id?", "question_id": "1"},
        {"image_id": 9, "question": "First?", "question_id": 2},
        {"image_id": 9, "question": "Second of one id?", "question_id": 2},
        {"image_id": 8, "question": "Other picture?", "question_id": 3},
        {"image_id": "9", "question": "Text image?", "question_id": 4},
        {"question": "No image?", "question_id": 5},
        {"image_id": 9, "question": None, "question_id": 6},
        {"image_id": 9, "question": "No id?"}, "odd",
        {"image_id": 9, "question": "Bad image?", "question_id": 8},
        {"image_id": 9, "question": "Number?", "question_id": 9},
        {"image_id": 9, "question": "Marked?", "question_id": 10},
    ]}  # fmt: skip
    answers = {"annotations": [
        {"question_id": 1, "image_id": 9, "multiple_choice_answer": "a"},
        {"question_id": 2, "image_id": 9, "multiple_choice_answer": "b"},
        {"question_id": 3, "image_id": 9, "multiple_choice_answer": "c"},
        {"question_id": 4, "image_id": 9, "multiple_choice_answer": "d"},
        {"question_id": 5, "image_id": 9, "multiple_choice_answer": "e"},
        {"question_id": 6, "image_id": 9, "multiple_choice_answer": "f"},
        {"question_id": 8, "image_id": -9, "multiple_choice_answer": "h"},
        {"question_id": 9, "image_id": 9, "multiple_choice_answer": 2},
        {"question_id": 10, "image_id": 9, "multiple_choice_answer": "", "answers": [
            {"answer": "yes</s>", "raw_answer": "Yes!"}, "no", {"answer": None}, 3]},
        {"question_id": None, "image_id": 9}, [1], "odd",
    ]}  # fmt: skip
    q = write_json("q.json", questions)
    a = write_json("mscoco_train2014_annotations.json", answers)
    report, built, _ = run("okvqa", [a], questions=[str(q)])
    assert [(q, a) for _, q, a in pairs(built)] == [
        ("<image>\nText id?", "a"), ("<image>\nFirst?", "b"), ("<image>\nText image?", "d"),
        ("<image>\nNo image?", "e"), ("<image>\nNumber?", "2"), ("<image>\nMarked?", "yes"),
    ]  # fmt: skip
    assert report["dropped"] == {
        "annotation_without_question": 1, "duplicate_question_id": 1, "empty_question": 1,
        "image_id_differs": 2, "question_without_id": 2, "record_not_an_object": 2}  # fmt: skip
    assert report["read"] == 15
    told = write_json("a.json", {"data_subtype": "val2014"} | answers)
    with pytest.raises(DataError, match="10 held_out_split"):  # whatever the file is called
        run("okvqa", [told], questions=[str(q)])
    cut = write_json("mscoco_train2014_annotations.json", answers)
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(DataError, match=rf"byte {cut.stat().st_size}, where the file ends"):
        run("okvqa", [cut], questions=[str(q)])


def test_okvqa_stems_are_mended(root, run, write_json, picture):
    picture(root / "COCO_train2014_000000000009.jpg", 1)
    given = [("poni tail", "Pony tail"), ("taxi", "taxi"), ("ski", "sky"), ("race", "racing")]
    questions = [{"image_id": 9, "question": f"{a}?", "question_id": n}
                 for n, (a, _) in enumerate(given)]  # fmt: skip
    answers = [{"image_id": 9, "question_id": n, "answers": [
        {"answer": a, "raw_answer": raw}, {"answer": a}, {"answer": "x", "raw_answer": "x"}]}
        for n, (a, raw) in enumerate(given)]  # fmt: skip
    q = write_json("OpenEnded_mscoco_train2014_questions.json", {"questions": questions})
    a = write_json("mscoco_train2014_annotations.json", {"annotations": answers})
    report, built, _ = run("okvqa", [a], questions=[str(q)])
    assert [r["messages"][1]["content"] for r in built] == ["pony tail", "taxi", "sky", "race"]
    assert report["repaired"] == {"stemming_mended": 2}


def test_tdiuc_pictures_of_visual_genome(root, run, write_json, picture):
    picture(root / "train2014" / "COCO_train2014_000000000009.jpg", 1)
    picture(root / "vg" / "VG_100K_2" / "2392588.jpg", 2)
    questions = [{"image_id": n, "question": "What?", "question_id": n} for n in (9, 2392588, 77)]
    answers = [
        {"image_id": n, "question_id": n, "question_type": "absurd", "ans_source": "generation",
         "answers": [{"answer": "doesnotapply", "answer_confidence": "yes", "answer_id": 1}]}
        for n in (9, 2392588, 77)
    ]  # fmt: skip
    q = write_json("OpenEnded_mscoco_train2014_questions.json", {"questions": questions})
    a = write_json("mscoco_train2014_annotations.json", {"annotations": answers})
    report, built, _ = run("tdiuc", [a], questions=[str(q)])
    assert pairs(built) == [
        ("train2014/COCO_train2014_000000000009.jpg", "<image>\nWhat?", "doesnotapply"),
        ("vg/VG_100K_2/2392588.jpg", "<image>\nWhat?", "doesnotapply"),
    ]
    assert [r["meta"]["question_type"] for r in built] == ["absurd", "absurd"]
    assert report["dropped"] == {"image_missing": 1}


def test_share_of_unanswerable(root, run, write_json, picture):
    picture(root / "VizWiz_train_00000000.jpg", 1)
    rows = [{"image": "VizWiz_train_00000000.jpg", "question": f"q{n}?",
             "answers": votes("unanswerable" if n < 6 else "basil")}
            for n in range(10)]  # fmt: skip
    path = write_json("train.json", rows)
    report, _, _ = run("vizwiz", [path])
    assert report["dropped"] == {}  # all stay unless a share is given
    for share, left in ((0.5, 4), (0.2, 1), (0, 0)):
        report, built, _ = run("vizwiz", [path], max_unanswerable=share)
        said = [r["messages"][1]["content"] for r in built]
        assert (said.count("unanswerable"), said.count("basil")) == (left, 4)
        assert report["dropped"] == {"unanswerable_over_share": 6 - left}
    some = [r["id"] for r in built]
    rows.reverse()
    _, built, _ = run("vizwiz", [write_json("train.json", rows)], max_unanswerable=0)
    assert len(built) == len(some)


def test_share_of_unanswerable_in_what_the_build_holds(root, run, write_json, picture):
    """Missing and broken pictures, duplicates, caps and weights come off before the share."""
    for number in range(30):
        picture(root / f"VizWiz_train_{number:08d}.jpg", number)
    (root / "VizWiz_train_00000029.jpg").write_bytes(b"broken")
    rows = [{"image": f"VizWiz_train_{n:08d}.jpg", "question": f"q{n}?",
             "answers": votes("unanswerable" if n % 2 else "basil")}
            for n in range(30)]  # fmt: skip
    rows += [{"image": f"VizWiz_train_{n:08d}.jpg", "question": "q?", "answers": votes("basil")}
             for n in range(100, 145)]  # fmt: skip
    path = write_json("train.json", rows)
    for keys, written in (({}, 21), ({"max": 10}, 10), ({"weight": 1.5}, 31)):
        report, built, _ = run("vizwiz", [path], max_unanswerable=0.3, **keys)
        said = [r["messages"][1]["content"] for r in built]
        assert report["dropped"]["image_missing"] == 45 and len(said) == written
        assert 0.2 < said.count("unanswerable") / len(said) <= 0.3


def test_textvqa(root, run, write_json, picture):
    picture(root / "train_images" / "003a8ae2ef43b901.jpg", 1)
    row = {"question_id": 1, "question": "what brand?", "image_id": "003a8ae2ef43b901",
           "answers": ["nokia"] * 6 + ["nok"] * 4, "set_name": "train"}  # fmt: skip
    rows = [row, row | {"set_name": "val"}, row | {"answers": []}, row | {"image_id": None}, 5]
    held = [{k: v for k, v in row.items() if k != "set_name"}]
    with pytest.raises(DataError, match="1 held_out_split"):  # its file's name tells
        run("textvqa", [write_json("TextVQA_0.5.1_val.json", {"data": held})])
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
    rows = [row, row | {"image": "VizWiz_val_00000000.jpg"}, row | {"question": None},
            row | {"image": "VizWiz_test_00000000.jpg"}, row | {"image": 5},
            row | {"question": "</s>"}]  # fmt: skip
    report, built, _ = run("vizwiz", [write_json("train.json", rows)])
    assert pairs(built) == [
        ("VizWiz_train_00000000.jpg", "<image>\nWhat is it?", "unanswerable")]  # fmt: skip
    assert report["dropped"] == {
        "empty_question": 2, "held_out_split": 2, "image_name_not_a_string": 1}  # fmt: skip
    with pytest.raises(DataError, match="held_out_split"):
        run("vizwiz", [write_json("val.json", [row | {"image": "renamed.jpg"}])])


def test_ocr_vqa(root, run, write_json, picture):
    picture(root / "0001.jpg", 1)
    picture(root / "0002.gif", 2)
    picture(root / "0010.jpg", 3)
    entry = {"imageURL": "http://x/a.jpg", "questions": ["Who?", "What?"],
             "answers": ["Ann", "A book"], "title": "t", "split": 1}  # fmt: skip
    content = {
        "0001": entry, "0002": entry | {"imageURL": "http://x/b.gif"}, "0003": entry | {"split": 2},
        "0004": entry | {"answers": ["one"]}, "0005": {"split": 1}, "0006": [], "0007": entry,
        "0008": entry | {"split": None}, "0009": entry | {"split": 3}, "../0001": entry,
        "0010": entry | {"questions": ["Again?"], "answers": [7], "split": "1", "imageURL": None},
    }  # fmt: skip
    report, built, _ = run("ocr_vqa", [write_json("dataset.json", content)])
    assert pairs(built) == [
        ("0001.jpg", "<image>\nWho?", "Ann"), ("0001.jpg", "<image>\nWhat?", "A book"),
        ("0002.gif", "<image>\nWho?", "Ann"), ("0002.gif", "<image>\nWhat?", "A book"),
        ("0010.jpg", "<image>\nAgain?", "7"),
    ]  # fmt: skip
    assert report["dropped"] == {
        "answer_count_differs": 2, "held_out_split": 4, "image_missing": 2,
        "image_path_unsafe": 2, "record_not_an_object": 1, "split_missing": 2,
        "turns_missing": 1}  # fmt: skip


def test_gqa(root, run, write_json, picture):
    picture(root / "VG_100K" / "n250821.jpg", 1)
    entry = {"question": "Which room is it?", "imageId": "n250821", "answer": "bedroom",
             "fullAnswer": "It is a bedroom."}  # fmt: skip
    content = {"1": entry, "2": entry | {"imageId": "404"}, "3": "x", "4": {"imageId": "n250821"},
               "5": entry | {"imageId": 250821, "answer": None}, "6": entry | {"imageId": None},
               "7": entry | {"question": 5}}  # fmt: skip
    path = write_json("train_balanced_questions.json", content)
    report, built, _ = run("gqa", [path])
    assert pairs(built) == [("VG_100K/n250821.jpg", "<image>\nWhich room is it?", "bedroom")]
    assert report["dropped"] == {
        "empty_answer": 1, "empty_question": 1, "image_missing": 1, "image_name_missing": 1,
        "question_not_a_text": 1, "record_not_an_object": 1}  # fmt: skip
    _, built, _ = run("gqa", [path], full_answers=True)
    assert built[0]["messages"][1]["content"] == "It is a bedroom."
    with pytest.raises(DataError, match="6 held_out_split"):
        run("gqa", [write_json("testdev_balanced_questions.json", content)])


def test_scienceqa(root, run, write_json, picture):
    picture(root / "train" / "7" / "image.png", 1)
    entry = {"question": "Which is a solid?", "choices": ["milk", "rock"], "answer": 1, "hint": "",
             "image": "image.png", "split": "train"}  # fmt: skip
    content = {
        "7": entry, "8": entry, "9": entry | {"image": None, "hint": "Think."},
        "10": entry | {"split": "test"}, "11": entry | {"answer": 2}, "12": entry | {"choices": []},
        "13": entry | {"split": "val"}, "14": entry | {"split": None}, "15": entry | {"image": 3},
        "16": entry | {"answer": True}, "17": entry | {"choices": ["a", " "]}, "18": [],
        "19": entry | {"question": None}, "../7": entry, "20": entry | {"answer": "B"},
    }  # fmt: skip
    path = write_json("problems.json", content)
    report, built, _ = run("scienceqa", [path])
    ask = "Answer with the option's letter from the given choices directly."
    assert pairs(built) == [
        ("train/7/image.png", f"<image>\nWhich is a solid?\nA. milk\nB. rock\n{ask}", "B"),
    ]  # fmt: skip
    # 8 has no picture of its own: that of 7 has the same name and must not be taken for it
    assert report["dropped"] == {
        "answer_not_among_choices": 3, "choices_missing": 2, "empty_question": 1,
        "held_out_split": 2, "image_missing": 1, "image_name_not_a_string": 1,
        "image_path_unsafe": 1, "no_picture": 1, "record_not_an_object": 1,
        "split_missing": 1}  # fmt: skip
    lists = write_json("pid_splits.json", {"train": ["9"], "minitrain": ["7"], "test": ["7"]})
    report, built, _ = run("scienceqa", [path, lists], text_only=True)
    assert [r["meta"]["orig_id"] for r in built] == ["9"]
    assert report["dropped"]["held_out_split"] == 3
    _, built, _ = run("scienceqa", [path], text_only=True)
    assert built[1]["images"] == []
    assert built[1]["messages"][0]["content"].startswith("Think.\nWhich is a solid?\nA. milk\n")
