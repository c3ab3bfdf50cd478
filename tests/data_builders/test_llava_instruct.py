"""LLaVA's released shape with its known defects, each asserted with its text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def row(image, *turns, identity="000000033471"):
    record = {"id": identity}
    if image is not None:
        record["image"] = image
    roles = ("human", "gpt")
    record["conversations"] = [
        {"from": roles[place % 2], "value": text} for place, text in enumerate(turns)
    ]
    return record


@pytest.fixture
def coco(root, picture):
    picture(root / "train2017" / "000000000001.jpg", 1)
    picture(root / "train2014" / "COCO_train2014_000000000002.jpg", 2)
    picture(root / "val2014" / "COCO_val2014_000000000003.jpg", 3)
    picture(root / "vg" / "VG_100K_2" / "2392588.jpg", 4)
    picture(root / "ocr_vqa" / "images" / "1437717772.png", 5)
    whole = picture(root / "train2017" / "000000000004.jpg", 6).read_bytes()
    (root / "train2017" / "000000000004.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "train2017" / "000000000005.jpg").write_bytes(b"")
    (root / "train2017" / "000000000006.jpg").write_bytes(b"<html>404</html>")
    picture(root / "train2017" / "000000000007.jpg", 7, size=(20, 40))
    Image.new("P", (40, 40)).save(root / "train2017" / "gif.gif")
    os.rename(root / "train2017" / "gif.gif", root / "train2017" / "000000000008.jpg")
    return root


def test_every_known_defect(coco, run, write_json):
    records = [
        row("000000000001.jpg", "<image>\nWhat is it?", "A bus.\n"),
        row("000000000001.jpg", "What is hanging there?\n<image>", "A  sign.\n\nTwo lines."),
        row("000000000002.jpg", "<image>\nFrom train2014?", "Yes."),
        row("coco/train2017/000000000003.jpg", "<image>\nFrom val2014?", "Yes."),
        row("vg/VG_100K/2392588.jpg", "<image>\nWhich folder?", "The other."),
        row("ocr_vqa/images/1437717772.jpg", "<image>\nWho wrote this?", "Nobody."),
        row(None, "Write a poem", "Roses.", identity="wgByO4Y_0"),
        row("000000000008.jpg", "<image>\nA GIF?", "Named jpg."),
        row("000000000001.jpg", "<image>\nStop?", "Here.</s> <EOI>"),
        row("000000000001.jpg", "No marker?", "Added."),
        row("000000000001.jpg", "<image>\nq1", "a1", "q2", "a2", "left over"),
        row("000000000001.jpg", "<image>\nq1", "  ", "q3", "a3"),
        row("000000000001.jpg", "<image>\nReally?", "It says <image> here."),
        row("000000000001.jpg", "<image>\nCafe\u0301?", "Noe\u0308l 猫 🐱"),
        # dropped from here on
        row("000000000004.jpg", "<image>\nTruncated?", "Yes."),
        row("000000000005.jpg", "<image>\nEmpty?", "Yes."),
        row("000000000006.jpg", "<image>\nHTML?", "Yes."),
        row("000000000007.jpg", "<image>\nSmall?", "Yes."),
        row("000000009999.jpg", "<image>\nMissing?", "Yes."),
        row("../secret.jpg", "<image>\nOut?", "Yes."),
        row("/etc/passwd", "<image>\nOut?", "Yes."),
        row("000000000001.jpg", "<image>\nNo answer"),
        row("000000000001.jpg", "<image>\nEmpty answer", "</s>"),
        row("000000000001.jpg", "<image>", "No question"),
        row(None, "<image>\nWhere is it?", "Nowhere."),
        {"id": "x", "image": "000000000001.jpg", "conversations": None},
        {"id": "x", "image": 7, "conversations": [{"from": "human", "value": "a"},
                                                  {"from": "gpt", "value": "b"}]},
        {"id": "x", "image": "000000000001.jpg",
         "conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        "not an object",
        row("000000000001.jpg", "<image>\nWhat is it?", "A bus."),
    ]  # fmt: skip
    report, built, _ = run("llava_instruct", [write_json("llava.json", records)])
    texts = {r["meta"]["orig_index"]: [m["content"] for m in r["messages"]] for r in built}
    paths = {r["meta"]["orig_index"]: r["images"] for r in built}
    first = 29 if 29 in texts else 0  # rows 0 and 29 are the same; one of them stays
    assert texts[first] == ["<image>\nWhat is it?", "A bus."]
    assert texts[1] == ["<image>\nWhat is hanging there?", "A  sign.\n\nTwo lines."]
    assert paths[2] == ["train2014/COCO_train2014_000000000002.jpg"]
    assert paths[3] == ["val2014/COCO_val2014_000000000003.jpg"]
    assert paths[4] == ["vg/VG_100K_2/2392588.jpg"]
    assert paths[5] == ["ocr_vqa/images/1437717772.png"]
    assert paths[6] == [] and texts[6] == ["Write a poem", "Roses."]
    assert paths[7] == ["train2017/000000000008.jpg"]
    assert texts[8] == ["<image>\nStop?", "Here."]
    assert texts[9] == ["<image>\nNo marker?", "Added."]
    assert texts[10] == ["<image>\nq1", "a1", "q2", "a2"]
    assert texts[11] == ["<image>\nq3", "a3"]
    assert texts[12][1] == "It says here."
    assert texts[13] == ["<image>\nCafé?", "Noël 猫 🐱"]
    assert {r["style"] for r in built if not r["images"]} == {"text"}
    assert {r["style"] for r in built if r["images"]} == {"chat"}
    assert len(built) == 14
    assert report["dropped"] == {
        "duplicate": 1, "empty_answer": 1, "empty_question": 1, "image_empty_file": 1,
        "image_missing": 1, "image_name_missing": 1, "image_name_not_a_string": 1,
        "image_not_an_image": 1, "image_path_unsafe": 2, "image_too_small": 1,
        "image_truncated": 1, "no_assistant_turn": 1, "record_not_an_object": 1,
        "roles_do_not_alternate": 1, "turns_missing": 1,
    }  # fmt: skip
    assert report["read"] == len(records) == report["kept"] + sum(report["dropped"].values())
    assert report["repaired"] == {
        "control_marker_removed": 3, "empty_round_removed": 1, "marker_added": 1,
        "trailing_question_removed": 1,
    }  # fmt: skip


def test_records_are_valid_conversations(coco, run, write_json):
    from cogvlm_sft.conversation import read_conversations

    _, _, result = run(
        "llava_instruct", [write_json("a.json", [row("000000000001.jpg", "<image>\nq", "a")])]
    )
    (conversation,) = read_conversations(result.out)
    assert conversation.images == ("train2017/000000000001.jpg",)
    assert conversation.id.startswith("llava_instruct:000000:")
    assert conversation.meta == {
        "license": "CC-BY-4.0", "orig_file": "a.json", "orig_index": 0, "orig_id": "000000033471",
    }  # fmt: skip


def test_parts_of_the_mix_are_told_apart(coco, run, write_json):
    short = "\nAnswer the question using a single word or phrase."
    letter = "\nAnswer with the option's letter from the given choices directly."
    train, genome = "coco/train2017/000000000001.jpg", "vg/VG_100K/2392588.jpg"
    records = [
        row(train, "<image>\nColour?" + short, "Red", "Big?", "Yes"),
        row(train, "<image>\nWhich?\nA. a\nB. b" + letter, "A"),
        row(train, "<image>\nPlease provide a short description for this region: [0.1, 0.2]", "a"),
        row(train, "<image>\nWhat is going on?", "A bus leaves."),
        row(genome, "<image>\nTell me more.", "It is a stove."),
        row("ocr_vqa/images/1437717772.jpg", "<image>\nWho wrote this?" + short, "Nobody"),
        row("elsewhere/000000000001.jpg", "<image>\nWhere?", "Here."),
    ]
    _, built, _ = run("llava_instruct", [write_json("mix.json", records)])
    assert [(r["style"], r["meta"].get("subset")) for r in built] == [
        ("vqa", "vqav2_okvqa"), ("vqa", "aokvqa"), ("chat", "refcoco"), ("chat", "llava"),
        ("chat", "visual_genome"), ("vqa", "ocr_vqa"), ("chat", None),
    ]  # fmt: skip


def test_what_released_rows_do_not_hold_but_other_files_do(coco, run, tmp_path):
    image = "000000000001.jpg"
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    records = [
        {"id": 1, "image": [image], "conversations": turns},
        {"id": "t", "image": "", "conversations": [{"from": "human", "value": "hi"}, turns[1]]},
        row(image, "<image>\nQuiz?", "Yes.\nQuestion: And then? Answer: No."),
        row(image, "<image>\nAnswers in full?", "Question: In full? Answer: It does."),
        row(image, "<image>\nAsks back?", "Question: What?"),
        row(image, "<image>\n[INST] Instructed? [/INST]", "<s> Yes </s> and <EOI>no<pad>"),
        row(image, "<image>\nNested?", "a </</s>s> b"),
        row(image, "<image>\nOf captions?", "As an AI, I see no mention of it."),
        row(image, "<image>\n<image>\nTwice?", "Once."),
        row(image, "First?", "One.", "<image>\nLate?", "Two."),
        {"id": "x", "image": [image, image], "conversations": [
            {"from": "human", "value": "<image>\n<image>\nDiffer?"}, turns[1]]},
        {"id": "x", "image": [image, 3], "conversations": turns},
        {"id": "x", "image": image, "conversations": [{"from": "system", "value": "s"}, *turns]},
        {"id": "x", "image": image, "conversations": [turns[0], {"from": "gpt", "value": 4}]},
        {"id": "x", "image": image, "conversations": []},
        {"id": "x", "image": image, "conversations": [turns[1]]},
        {"id": "x", "image": image, "conversations": ["q", "a"]},
        {"id": "\ud83d", "image": image, "conversations": turns},
        row(image, "<image>\nNUL\0?", "a"),
    ]  # fmt: skip
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    report, built, _ = run("llava_instruct", [path])
    texts = {r["meta"]["orig_index"]: [m["content"] for m in r["messages"]] for r in built}
    assert texts == {
        0: ["<image>\nq", "a"],
        1: ["hi", "a"],
        2: ["<image>\nQuiz?", "Yes.\nAnd then? Answer: No."],
        3: ["<image>\nAnswers in full?", "In full? Answer: It does."],
        4: ["<image>\nAsks back?", "What?"],
        5: ["<image>\nInstructed?", "Yes and no"],
        6: ["<image>\nNested?", "a b"],  # the halves do not join
        7: ["<image>\nOf captions?", "As an AI, I see no mention of it."],
        8: ["<image>\nTwice?", "Once."],
        9: ["<image>\nFirst?", "One.", "Late?", "Two."],
    }
    assert built[7]["meta"]["flags"] == ["refusal", "speaks_of_the_prompt"]
    assert report["dropped"] == {
        "image_name_not_a_string": 1, "no_assistant_turn": 2,
        "several_images": 1, "text_not_a_string": 1, "text_not_unicode": 2,
        "turn_not_an_object": 1, "unknown_role": 1,
    }  # fmt: skip
    assert report["read"] == len(records)
    assert report["repaired"] == {
        "control_marker_removed": 2, "flagged_refusal": 1, "flagged_speaks_of_the_prompt": 1,
        "leading_answer_removed": 1, "marker_moved_or_merged": 2, "question_label_removed": 3,
    }  # fmt: skip


def test_files_listed_twice_over_count_once(coco, run, write_json):
    records = [row("000000000001.jpg", f"<image>\nq{n}", "a") for n in range(6)]
    mixed = [row("coco/train2017/000000000001.jpg", f"q{n}\n<image>", "a") for n in range(6)]
    paths = [write_json("llava_instruct_150k.json", records),
             write_json("conversation_58k.json", records[:3]),
             write_json("llava_v1_5_mix665k.json", [*mixed, row(None, "hi", "yo")])]  # fmt: skip
    report, built, _ = run("llava_instruct", paths)
    assert report["read"] == 16 and len(built) == 7
    assert report["dropped"] == {"duplicate": 9}


def test_a_link_out_of_the_root_is_dropped(coco, run, write_json, tmp_path, picture):
    picture(tmp_path / "outside.jpg", 9)
    (coco / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    records = [row("link.jpg", "<image>\nq", "a"), row("000000000001.jpg", "<image>\nq", "b")]
    report, built, _ = run("llava_instruct", [write_json("a.json", records)])
    assert report["dropped"] == {"image_outside_root": 1}
    assert len(built) == 1


def script(*arguments, module="llava_instruct", cwd):
    return subprocess.run(
        [sys.executable, "-m", f"data_builders.sources.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_as_a_script(coco, write_json, tmp_path, read):
    path = write_json("a.json", [row("000000000001.jpg", "<image>\nq", "a")])
    done = script("--annotations", path, "--images", coco, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 conversation in out" in done.stdout
    assert read(tmp_path / "out")[0]["images"] == ["train2017/000000000001.jpg"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/jpeg;base64," in page and "<script" not in page


def test_script_names_mistakes(coco, write_json, tmp_path):
    missing = script("--annotations", "no.json", "--images", coco, "--out", "out", cwd=tmp_path)
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: ") and "no.json" in missing.stderr
    assert missing.stderr.count("\n") == 1
    content = json.dumps([row("000000000001.jpg", "<image>\nq", "a")] * 3)
    cut = tmp_path / "cut.json"
    cut.write_text(content[:-40])
    broken = script("--annotations", cut, "--images", coco, "--out", "out", cwd=tmp_path)
    assert broken.returncode == 2
    assert f"byte {len(content) - 40}" in broken.stderr and "truncated" in broken.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.json", "pictures"]
    helped = script("--help", cwd=tmp_path)
    assert helped.returncode == 0 and "--annotations llava_instruct_150k.json" in helped.stdout
