"""LRV, LLaVAR and CogVLM-SFT-311K in their released shapes, with their known defects."""

import json
from pathlib import Path

import pytest

from cogvlm_sft.errors import DataError


def contents(built):
    return [[m["content"] for m in r["messages"]] for r in built]


def test_lrv(root, run, write_json, picture):
    picture(root / "image" / "2392588.jpg", 1)
    picture(root / "chart_image" / "chart_12.png", 2)
    no = "no mention of a teapot on the white electric stove in the kitchen."
    rows = [
        {"image_id": "2392588", "question": "Can you see a blue teapot?",
         "answer": f"There is {no}", "task": "negative"},
        {"image_id": 2392588, "question": "Describe the wall", "answer": "It is white."},
        {"image_id": "chart_12.png", "question": "Highest bar?", "answer": "2020"},
        {"image_id": "2392588", "question": "q", "answer": "This is not specified in the image."},
        {"image_id": "2392588", "question": "q", "answer": "See the bounding box."},
        {"image_id": "2392588", "question": "q", "answer": "According to the dense captions, red."},
        {"image_id": "2392588", "question": "Dog at X: 12 Y: 40 Width: 3 Height: 9?",
         "answer": "Yes."},
        {"image_id": "1", "question": "q", "answer": "a"},
        {"image_id": "2392588", "question": "q"},
        {"image_id": "2392588", "answer": "a"},
        {"question": "q", "answer": "a"},
        {"image_id": ["2392588"], "question": "q", "answer": "a"},
        3,
    ]  # fmt: skip
    report, built, _ = run("lrv_instruction", [write_json("filter_cap1.json", rows)])
    assert contents(built) == [
        [
            "<image>\nCan you see a blue teapot?",
            "There is no teapot on the white electric stove in the kitchen.",
        ],
        ["<image>\nDescribe the wall", "It is white."],
        ["<image>\nHighest bar?", "2020"],
    ]
    assert [r["images"] for r in built] == [
        ["image/2392588.jpg"],
        ["image/2392588.jpg"],
        ["chart_image/chart_12.png"],
    ]
    assert built[0]["meta"]["task"] == "negative" and "task" not in built[1]["meta"]
    assert report["dropped"] == {
        "answer_speaks_of_the_prompt": 3, "coordinates_left_over": 1, "empty_answer": 1,
        "empty_question": 1, "image_missing": 1, "image_name_missing": 1,
        "image_name_not_a_string": 1, "record_not_an_object": 1,
    }  # fmt: skip
    assert report["repaired"] == {"no_mention_rewritten": 1}


@pytest.mark.parametrize(
    "answer, kept",
    [
        ("There is no mention of a dog.", "There is no dog."),
        ("No, there's no mention of any dogs here.", "No, there are no dogs here."),
        ("There is no mention of whether it is red.", None),
        ("There is no mention of it.", None),
        (
            "There is no mention of an orange cat on top of the table.",
            "There is no orange cat on top of the table.",
        ),
        (
            "There was no mention of a boy near the man's car.",
            "There is no boy near the man's car.",
        ),
        (
            "There is no mention of any red cars parked in the street.",
            "There are no red cars parked in the street.",
        ),
        ("There is no mention of any people.", "There are no people."),
        ("There is no mention of any glass on the table.", "There is no glass on the table."),
        ("There is no mention of the color of the car in the image.", None),
        ("There is no mention of a specific color.", None),
        ("There is no mention of a picture of the president.", None),
        ("There is no mention of the man's age.", None),
        ("There is no mention of a man's age.", None),
        ("There is no mention of any of the items.", None),
        ("There is no mention of there being a dog.", None),
        ("There is no mention of a dog being in the picture.", None),
        ("There is no mention of anything else.", None),
        ("There is no mention of children.", None),
        ("There is no mention of his car.", None),
        ("There is no mention of a dog. There is no mention of the sky.", None),
        ("The picture makes no mention of a dog.", None),
        ("The color is not specified in the description.", None),
        ("The colour is not explicitly stated.", None),
        ("The image doesn't mention a dog.", None),
        ("According to the dense captions, red.", None),
        ("The caption says it is red.", None),
        ("The bounding box is large.", None),
        ("It stands at X: 12, Y: 40, Width: 3, Height: 9.", None),
        ("Width: 3 Height: 9", None),
        ("It is at X:195 Y:45 Width:120 Height:120.", None),
        ("It is at X: Y: Width: Height:", None),
        ("It is at X=12, Y=40.", None),
        ("There isn't any mention of a dog.", None),
        ("There is no explicit mention of a dog.", None),
        ("A dog is never mentioned.", None),
        ("The bounding-box is large.", None),
        ("The label says Width: 30 cm.", "same"),
        ("The clock reads 12:40 and the ratio is 3: 4.", "same"),
        ("The sign says: X marks the spot", "same"),
        ("Short", "same"),
        ("No", "same"),
    ],
)
def test_lrv_answers(answer, kept, root, run, write_json, picture):
    picture(root / "2.jpg", 1)
    rows = [{"image_id": "2", "question": "Tell me.", "answer": answer, "task": "negative"},
            {"image_id": "2", "question": "Another?", "answer": "Yes."}]  # fmt: skip
    path = write_json("filter_cap1.json", rows)
    report, built, _ = run("lrv_instruction", [path])
    found = [r["messages"][1]["content"] for r in built if r["meta"]["orig_index"] == 0]
    assert found == ([] if kept is None else [answer if kept == "same" else kept])
    assert sum(report["dropped"].values()) == (kept is None)
    _, built, _ = run("lrv_instruction", [path], clean=False)
    assert built[0]["messages"][1]["content"] == answer


def test_lrv_pictures(root, run, write_json, picture):
    picture(root / "VG_100K" / "10.jpg", 1)
    picture(root / "VG_100K_2" / "11.jpg", 2)
    picture(root / "VG_100K" / "12.jpg", 3)
    picture(root / "VG_100K_2" / "12.jpg", 3)
    picture(root / "chart_image" / "Chart_9.PNG", 4)
    picture(root / "__MACOSX" / "chart_image" / "chart_10.png", 5)
    picture(root / "secret.jpg", 6)
    names = ["10", 11, "12.jpg", " 10 ", "chart_9.png", "chart_10.png", "../secret", "", 1.5]
    rows = [{"image_id": name, "question": f"q{n}", "answer": 7} for n, name in enumerate(names)]
    report, built, _ = run("lrv_instruction", [write_json("filter_cap1.json", rows)])
    assert [(r["messages"][0]["content"][-1], r["images"][0]) for r in built] == [
        ("0", "VG_100K/10.jpg"), ("1", "VG_100K_2/11.jpg"), ("2", "VG_100K/12.jpg"),
        ("3", "VG_100K/10.jpg"), ("4", "chart_image/Chart_9.PNG"),
    ]  # fmt: skip
    assert report["dropped"] == {
        "image_missing": 1, "image_name_missing": 1, "image_name_not_a_string": 1,
        "image_path_unsafe": 1}  # fmt: skip


def test_lrv_questions_about_a_picture_as_one_conversation(root, run, write_json, picture):
    for number in (1, 2):
        picture(root / f"{number}.jpg", number)
    rows = [{"image_id": str(n), "question": f"q{k}?", "answer": f"a{k}.", "task": "negative"}
            for k, n in enumerate([1, 2, 1, 1, 404, 404])]  # fmt: skip
    rows += [rows[0], {"image_id": "1", "question": "q", "answer": "It is not specified."}, 7]
    report, built, _ = run("lrv_instruction", [write_json("filter_cap1.json", rows)], group=2)
    assert sorted(contents(built)) == [
        ["<image>\nq0?", "a0.", "q2?", "a2."], ["<image>\nq1?", "a1."], ["<image>\nq3?", "a3."],
    ]  # fmt: skip
    assert (report["read"], report["kept"], report["conversations"]) == (9, 4, 3)
    assert report["dropped"] == {
        "answer_speaks_of_the_prompt": 1, "duplicate": 1, "image_missing": 2,
        "record_not_an_object": 1}  # fmt: skip


def test_lrv_wrapped_and_uncleaned(root, run, write_json, picture):
    picture(root / "2.jpg", 1)
    rows = [{"image_id": "2", "question": "q", "answer": "No mention of it."}]
    path = write_json("filter_cap.json", {"annotations": rows})
    _, built, _ = run("lrv_instruction", [path], clean=False)
    assert contents(built) == [["<image>\nq", "No mention of it."]]
    with pytest.raises(DataError, match=r'object with "annotations" or .*found .*\[\'rows\'\]'):
        run("lrv_instruction", [write_json("bad.json", {"rows": rows})])


def test_llavar_takes_only_its_own_part(root, run, write_json, picture):
    picture(root / "finetune" / "100000000012.jpg", 1)
    picture(root / "coco" / "000000033471.jpg", 2)
    picture(root / "finetune" / "renamed.jpg", 3)

    def row(image):
        return {"id": image[:-4], "image": image, "conversations": [
            {"from": "human", "value": "What does the sign say?\n<image>"},
            {"from": "gpt", "value": "Stop"}]}  # fmt: skip

    rows = [row("000000033471.jpg"), row("100000000012.jpg"), row("100000000404.jpg"),
            row("coco/train2017/000000033471.jpg"), row("COCO_train2014_000000033471.jpg"),
            row("renamed.jpg"), row("x.jpg") | {"image": ""},
            row("x.jpg") | {"image": ["finetune/100000000012.jpg"], "conversations": [
                {"from": "human", "value": "<image>\nListed?"}, {"from": "gpt", "value": "y"}]},
            "odd"]  # fmt: skip
    report, built, result = run("llavar", [write_json("llavar.json", rows)])
    assert [(r["images"], r["messages"][0]["content"]) for r in built] == [
        (["finetune/100000000012.jpg"], "<image>\nWhat does the sign say?"),
        (["finetune/renamed.jpg"], "<image>\nWhat does the sign say?"),
        (["finetune/100000000012.jpg"], "<image>\nListed?"),
    ]
    assert report["dropped"] == {
        "image_missing": 1, "image_name_missing": 1, "part_of_llava_instruct": 3,
        "record_not_an_object": 1}  # fmt: skip
    assert report["commercial_use"] is False
    assert result.manifest["licenses"] == ["CC-BY-NC-4.0"]


@pytest.fixture
def released_311k(root, picture):
    def label(folder, language, stem, content):
        path = root / folder / f"labels{language}" / f"{stem}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    multi, single = "llava_instruction_multi_conversations_formate", "llava_details-minigpt4"
    for number, folder in enumerate((multi, single)):
        picture(root / folder / "images" / "00000001.jpg", number)
    turns = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A bus."},
        {"role": "user", "content": "Colour?"},
        {"role": "assistant", "content": "Red."},
    ]
    label(multi, "_en", "00000001", {"conversations": turns})
    label(
        multi,
        "_zh",
        "00000001",
        {
            "conversations": [
                {"role": "user", "content": "这是什么?"},
                {"role": "assistant", "content": "一辆公共汽车。"},
            ]
        },
    )
    label(multi, "_en", "00000002", {"conversations": turns})
    label(single, "", "00000001", {"captions": [{"role": "caption", "content": "A photograph."}]})
    label(single, "", "00000003", {"captions": []})
    return root


def test_cogvlm_311k(released_311k, run):
    report, built, _ = run("cogvlm_sft_311k", [released_311k])
    found = {(r["meta"]["orig_file"], r["meta"]["orig_id"]): r for r in built}
    multi = "llava_instruction_multi_conversations_formate"
    english = found[f"{multi}/labels_en", "00000001"]
    assert english["images"] == [f"{multi}/images/00000001.jpg"]
    assert [m["content"] for m in english["messages"]] == [
        "<image>\nWhat is it?", "A bus.", "Colour?", "Red."]  # fmt: skip
    assert found[f"{multi}/labels_zh", "00000001"]["meta"]["language"] == "zh"
    caption = found["llava_details-minigpt4/labels", "00000001"]
    assert caption["messages"][1]["content"] == "A photograph."
    assert caption["messages"][0]["content"].startswith("<image>\n")
    assert report["dropped"] == {"image_missing": 1, "turns_missing": 1}
    assert report["read"] == 5 and len(built) == 3


@pytest.mark.parametrize("where, given", [("", "."), ("llava_details-minigpt4", "."),
                                          ("llava_details-minigpt4", "labels"),
                                          ("llava_details-minigpt4/labels", ".")])  # fmt: skip
def test_cogvlm_311k_from_inside_of_the_set(where, given, released_311k, run, monkeypatch):
    monkeypatch.chdir(released_311k / where)
    _, built, _ = run("cogvlm_sft_311k", [Path(given)])
    assert "llava_details-minigpt4/images/00000001.jpg" in [r["images"][0] for r in built]


def test_cogvlm_311k_names_languages_and_captions(root, run, picture):
    folders = (
        "llava_details-minigpt4_3500_formate",
        "llava_instruction_multi_conversation_formate",
        "llava_instruction_single_conversations_formate",
    )  # with and without an s
    labels = {
        (0, "labels_en", "1"): {"captions": [{"role": "caption", "content": "The sign 停 says."}]},
        (0, "labels_zh", "1"): {"captions": [
            {"role": "caption", "content": "写着STOP和GO的牌子。</s>"}]},
        (0, "labels", "2"): {"captions": [{"content": "One."}, {"content": "Two."}]},
        (0, "labels", "3"): {"captions": ["One."]},
        (1, "labels_zh", "1"): {"conversations": [
            {"role": "user", "content": "几?"}, {"role": "assistant", "content": "3"}]},
        (2, "labels", "1"): {"conversations": [
            {"role": "user", "content": "Quote."},
            {"role": "assistant", "content": "It says 停止 here."}]},
        (2, "labels", "2"): {},
        (2, "labels", "3"): ["x"],
    }  # fmt: skip
    for (number, language, stem), content in labels.items():
        path = root / folders[number] / language / f"{stem}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        picture(root / folders[number] / "images" / f"{stem}.png", 10 * number + int(stem))
    (root / "__MACOSX" / "labels").mkdir(parents=True)
    (root / "__MACOSX" / "labels" / "._1.json").write_bytes(b"\0\1")
    report, built, _ = run("cogvlm_sft_311k", [root])
    found = {(r["images"][0], r["messages"][1]["content"]): r["meta"]["language"] for r in built}
    assert found == {
        (f"{folders[0]}/images/1.png", "The sign 停 says."): "en",
        (f"{folders[0]}/images/1.png", "写着STOP和GO的牌子。"): "zh",
        (f"{folders[0]}/images/2.png", "One."): "en",
        (f"{folders[1]}/images/1.png", "3"): "zh",
        (f"{folders[2]}/images/1.png", "It says 停止 here."): "en",
    }
    assert report["dropped"] == {
        "record_not_an_object": 1, "text_not_a_string": 1, "turns_missing": 1}  # fmt: skip
    assert report["repaired"] == {"control_marker_removed": 1, "further_captions_left_out": 1}
    _, built, _ = run("cogvlm_sft_311k", [root / folders[1]])
    assert len(built) == 1


def test_cogvlm_311k_in_one_language(released_311k, run):
    report, built, _ = run("cogvlm_sft_311k", [released_311k], languages=["zh"])
    assert [r["messages"][1]["content"] for r in built] == ["一辆公共汽车。"]
    assert report["dropped"]["language_en_not_wanted"] == 3


def test_cogvlm_311k_broken_label(released_311k, run, tmp_path):
    path = next(released_311k.glob("*/labels_zh/*.json"))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=r"00000001\.json: not valid JSON at byte 20"):
        run("cogvlm_sft_311k", [released_311k])
    with pytest.raises(DataError, match="holds no labels"):
        run("cogvlm_sft_311k", [tmp_path / "pictures" / "llava_details-minigpt4" / "images"])
