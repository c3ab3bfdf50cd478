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


def test_short_answer_rows_of_the_mix_are_vqa(coco, run, write_json):
    suffix = "\nAnswer the question using a single word or phrase."
    records = [
        row("coco/train2017/000000000001.jpg", "<image>\nColour?" + suffix, "Red", "Big?", "Yes"),
        row("vg/VG_100K/2392588.jpg", "<image>\nTell me more.", "It is a stove."),
    ]
    _, built, _ = run("llava_instruct", [write_json("mix.json", records)])
    assert [(r["style"], r["meta"]["subset"]) for r in built] == [
        ("vqa", "coco"),
        ("chat", "visual_genome"),
    ]


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
    assert "1 conversations in out" in done.stdout
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
