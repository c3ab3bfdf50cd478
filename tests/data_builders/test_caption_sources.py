"""Caption sets in their released shapes: every caption kept or dropped by name, splits held out."""

import pytest

from cogvlm_sft.conversation import read_conversations
from cogvlm_sft.errors import DataError
from data_builders import annotations, caption_sets
from data_builders.annotations import read_records
from data_builders.caption_sets import REQUESTS
from data_builders.recipe import SourceEntry
from data_builders.source import load_source


def captions(built):
    assert {r["messages"][0]["content"] for r in built} <= {f"<image>\n{ask}" for ask in REQUESTS}
    return [(r["images"][0], r["messages"][1]["content"]) for r in built]


def karpathy(name, split, *sentences, folder=None):
    record = {"filename": name, "split": split, "imgid": 0, "sentids": list(range(len(sentences)))}
    if folder:
        record |= {"filepath": folder, "cocoid": 1}
    return record | {
        "sentences": [{"raw": s, "tokens": [], "imgid": 0, "sentid": n}
                      for n, s in enumerate(sentences)]}  # fmt: skip


def test_karpathy_coco(root, run, write_json, picture):
    picture(root / "train2014" / "COCO_train2014_000000000009.jpg", 1)
    picture(root / "train2017" / "000000000025.jpg", 2)
    picture(root / "val2014" / "COCO_val2014_000000000042.jpg", 3)
    images = [
        karpathy("COCO_train2014_000000000009.jpg", "train", "A dog. ", "Two  dogs",
                 folder="train2014"),
        karpathy("COCO_val2014_000000000025.jpg", "restval", "A hat.</s>", folder="val2014"),
        karpathy("COCO_val2014_000000000042.jpg", "val", "x", "y", folder="val2014"),
        karpathy("COCO_val2014_000000000042.jpg", "test", "z", folder="val2014"),
        karpathy("COCO_train2014_000000000404.jpg", "train", "Gone.", folder="train2014"),
        karpathy("COCO_train2014_000000000009.jpg", "train", folder="train2014"),
        karpathy("COCO_train2014_000000000009.jpg", "train", " ", None, 7, folder="train2014"),
        karpathy("COCO_train2014_000000000009.jpg", None, "No split.", folder="train2014"),
        karpathy(None, "train", "No name."),
        {"split": "train", "filename": "a.jpg", "sentences": ["plain text"]},
        "no object",
    ]  # fmt: skip
    path = write_json("dataset_coco.json", {"images": images, "dataset": "coco"})
    report, built, _ = run("coco_captions", [path])
    assert captions(built) == [
        ("train2014/COCO_train2014_000000000009.jpg", "A dog."),
        ("train2014/COCO_train2014_000000000009.jpg", "Two  dogs"),
        ("train2017/000000000025.jpg", "A hat."),
    ]
    assert report["read"] == 15 and report["kept"] == 3
    assert report["dropped"] == {
        "answer_not_a_text": 1, "empty_answer": 2, "held_out_split": 3, "image_missing": 1,
        "image_name_missing": 1, "picture_without_caption": 1, "record_not_an_object": 2,
        "split_missing": 1,
    }  # fmt: skip
    _, built, _ = run("coco_captions", [path], splits=["val", "test"])
    assert [(r["meta"]["split"], r["messages"][1]["content"]) for r in built] == [
        ("val", "x"), ("val", "y"), ("test", "z")]  # fmt: skip


def test_karpathys_file_is_never_held_whole(write_json, monkeypatch):
    """Batches are taken one at a time; the published file needs a gigabyte once decoded."""
    taken = 0

    def counted(*given):
        nonlocal taken
        for batch in read_records(*given):
            taken += 1
            yield batch

    monkeypatch.setattr(annotations, "ROWS", 2)
    monkeypatch.setattr(caption_sets, "read_records", counted)
    images = [karpathy(f"COCO_train2014_{n:012d}.jpg", "train", "A dog.") for n in range(20)]
    path = write_json("dataset_coco.json", {"images": images})
    entry = SourceEntry(source="coco_captions", annotations=[path])
    batches = load_source("coco_captions")(entry).batches(None)
    for number in range(1, 11):
        assert len(next(batches).records) == 2 and taken == number


def official(*captions, images=((9, "COCO_train2014_000000000009.jpg"),)):
    return {
        "info": {},
        "images": [{"id": n, "file_name": name, "width": 4, "height": 3} for n, name in images],
        "annotations": [
            {"id": n, "image_id": i, "caption": c} for n, (i, c) in enumerate(captions)
        ],
    }  # fmt: skip


def test_official_coco(root, run, write_json, picture):
    picture(root / "COCO_train2014_000000000009.jpg", 1)
    images = [
        (9, "COCO_train2014_000000000009.jpg"), (10, "COCO_train2014_000000000010.jpg"),
        (9, "COCO_train2014_000000000011.jpg"), (12, "COCO_train2014_000000000012.jpg"),
        (None, "COCO_train2014_000000000013.jpg"),
    ]  # fmt: skip
    content = official((9, "A dog."), (9, "One more."), (10, "Gone."), (77, "Of nothing."),
                       (9, ""), (None, "x"), images=images)  # fmt: skip
    content["annotations"].append([1])
    path = write_json("captions_train2014.json", content)
    report, built, _ = run("coco_captions", [path])
    assert captions(built) == [
        ("COCO_train2014_000000000009.jpg", "A dog."),
        ("COCO_train2014_000000000009.jpg", "One more."),
    ]
    assert [r["meta"]["orig_id"] for r in built] == ["0", "1"]
    assert report["dropped"] == {
        "caption_without_picture": 2, "duplicate_picture_id": 1, "empty_answer": 1,
        "image_missing": 1, "picture_without_caption": 1, "picture_without_id": 1,
        "record_not_an_object": 1,
    }  # fmt: skip
    assert report["read"] == 10
    held = write_json("captions_val2014.json", content)
    with pytest.raises(DataError, match="held_out_split"):
        run("coco_captions", [held])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=rf"byte {path.stat().st_size}, where the file ends"):
        run("coco_captions", [path])


def test_pictures_tell_the_split_where_the_file_does_not(root, run, write_json, picture):
    names = ("COCO_train2014_000000000009.jpg", "COCO_val2014_000000000042.jpg", "000000000073.jpg")
    for number, name in enumerate(names):
        picture(root / name, number)
    content = official((0, "A."), (1, "B."), (2, "C."), images=list(enumerate(names)))
    report, built, _ = run("coco_captions", [write_json("captions.json", content)])
    assert captions(built) == [(names[0], "A."), (names[2], "C.")]
    assert report["dropped"] == {"held_out_split": 1}
    _, built, _ = run("coco_captions", [write_json("captions_train2017.json", content)])
    assert len(built) == 3  # train2017 holds pictures of val2014


def test_flickr30k(root, run, write_json, picture):
    picture(root / "1000092795.jpg", 1)
    images = [
        karpathy("1000092795.jpg", "train", "Two young guys .", "Two men"),
        karpathy("10002456.jpg", "test", "held out"),
    ]
    report, built, _ = run("flickr30k", [write_json("dataset_flickr30k.json", {"images": images})])
    assert captions(built) == [
        ("1000092795.jpg", "Two young guys ."), ("1000092795.jpg", "Two men")]  # fmt: skip
    assert report["dropped"] == {"held_out_split": 1}
    path = write_json("dataset_flickr30k.json", {"images": images})
    _, built, result = run("flickr30k", [path], style="base")
    assert {r["messages"][0]["content"] for r in built} == {"<image>"}
    assert len(list(read_conversations(result.out))) == 2


TOKENS = (
    '1000092795.jpg#0\tTwo young guys .\r\n1000092795.jpg#1\tTwo " | men</s>\n'
    "10002456.jpg#0\tHeld\n2199200615.jpg#4 no tab\n\n1000092795.jpg#2\t \n7.jpg#0\tIn no list"
)
PIPES = (
    "image_name| comment_number| comment\n1000092795.jpg| 0| Two young guys .\n"
    '1000092795.jpg| 1| Two " | men</s>\n10002456.jpg| 0| Held\n'
    "2199200615.jpg| 4   A dog runs .\n1000092795.jpg| 2|\n7.jpg| 0| In no list\n"
)


@pytest.mark.parametrize("name, text", [("results_20130124.token", TOKENS), ("results.csv", PIPES)])
def test_flickr30k_in_its_original_file(name, text, root, run, tmp_path, picture):
    for stem in ("1000092795", "10002456", "7"):
        picture(root / f"{stem}.jpg", len(stem))
    path = tmp_path / name
    path.write_text(text)
    report, built, _ = run("flickr30k", [path])
    assert captions(built) == [
        ("1000092795.jpg", "Two young guys ."), ("1000092795.jpg", 'Two " | men'),
        ("10002456.jpg", "Held"), ("7.jpg", "In no list")]  # fmt: skip
    assert built[1]["meta"]["orig_id"] == "1000092795.jpg#1"
    assert report["dropped"] == {"empty_answer": 1, "line_malformed": 1}
    assert report["repaired"]["split_unknown"] == 6 == report["read"]
    lists = []
    for split, ids in (
        ("val", "10002456\n"),
        ("test", "1\n"),
        ("train", "1000092795\n2199200615\n"),
    ):
        lists.append(tmp_path / f"{split}.txt")
        lists[-1].write_text(ids)
    report, built, _ = run("flickr30k", [path, *lists])
    assert [name for name, _ in captions(built)] == ["1000092795.jpg"] * 2
    assert report["dropped"] == {
        "empty_answer": 1, "held_out_split": 1,
        "line_malformed": 1, "split_missing": 1,
    }  # fmt: skip
    assert "split_unknown" not in report["repaired"]
    report, built, _ = run("flickr30k", [path, *lists[:2]])  # without train.txt the rest trains
    assert len(built) == 3 and report["dropped"]["held_out_split"] == 1
    path.write_text(text + "\n10002456")
    with pytest.raises(DataError, match=rf"the file ends at byte {len(path.read_bytes())} inside"):
        run("flickr30k", [path])
    path.write_bytes(text.encode() + b"\n\xff")
    with pytest.raises(DataError, match=rf"not UTF-8 at byte {len(text.encode()) + 1}"):
        run("flickr30k", [path])


def test_flickr30k_as_a_table_of_sentences(root, run, tmp_path, picture):
    picture(root / "1000092795.jpg", 1)
    path = tmp_path / "flickr_annotations_30k.csv"
    path.write_text(
        "raw,sentids,split,filename,img_id\n"
        '"[""Two young guys ."", ""B \\u00e9""]","[0, 1]",train,1000092795.jpg,0\n'
        '"[""T""]",[5],test,10002456.jpg,1\nbroken,[1],train,1000092795.jpg,2\n'
        "[],[1],train,1000092795.jpg,3,more\n"
    )
    report, built, _ = run("flickr30k", [path])
    assert captions(built) == [
        ("1000092795.jpg", "Two young guys ."), ("1000092795.jpg", "B é")]  # fmt: skip
    assert report["dropped"] == {
        "cell_count_differs": 1, "held_out_split": 1, "picture_without_caption": 1}  # fmt: skip


def test_nocaps_is_for_evaluation_only(root, run, write_json, picture):
    picture(root / "0013ea2087020901.jpg", 1)
    content = official((0, "A baby."), (0, "A child."), images=[(0, "0013ea2087020901.jpg")])
    content["images"][0] |= {"domain": "in-domain", "open_images_id": "0013ea2087020901"}
    path = write_json("nocaps_val_4500_captions.json", content)
    with pytest.raises(DataError, match=r"no conversation is left .*2 held_out_split"):
        run("nocaps", [path])
    with pytest.raises(DataError, match="held_out_split"):  # whatever it is called
        run("nocaps", [write_json("train.json", content)])
    _, built, _ = run("nocaps", [path], splits=["val"])
    assert captions(built) == [
        ("0013ea2087020901.jpg", "A baby."), ("0013ea2087020901.jpg", "A child.")]  # fmt: skip
    assert [r["meta"]["domain"] for r in built] == ["in-domain", "in-domain"]


def test_textcaps(root, run, write_json, picture):
    picture(root / "train_images" / "011e7e629fb9ae7b.jpg", 1)
    row = {"image_id": "011e7e629fb9ae7b", "caption_str": "A sign says stop.", "caption_id": 30,
           "set_name": "train", "reference_strs": ["a"], "image_path": "train/x.jpg"}  # fmt: skip
    rows = [row, row | {"caption_str": "A stop sign."}, row | {"set_name": "val"},
            row | {"caption_str": ""}, row | {"image_id": None}, row | {"image_id": "nope"},
            row | {"set_name": "odd"}, None]  # fmt: skip
    report, built, _ = run("textcaps", [write_json("TextCaps_0.1_train.json", {"data": rows})])
    assert captions(built) == [
        ("train_images/011e7e629fb9ae7b.jpg", "A sign says stop."),
        ("train_images/011e7e629fb9ae7b.jpg", "A stop sign."),
    ]
    assert report["dropped"] == {
        "empty_answer": 1, "held_out_split": 1, "image_missing": 1, "image_name_missing": 1,
        "record_not_an_object": 1, "split_missing": 1}  # fmt: skip
    for row in rows[:2]:
        del row["set_name"]
    with pytest.raises(DataError, match="held_out_split"):  # the file's name speaks then
        run("textcaps", [write_json("TextCaps_0.1_val.json", {"data": rows[:2]})])
