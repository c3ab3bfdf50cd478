"""Boxes: REFER's pickles, Shikra's lines, Entities' XML, Visual7W; floored, safe, counted."""

import io
import json
import pickle
import shutil
from fractions import Fraction
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvlm_sft.demo import drawn
from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.metrics.boxes import write_box
from data_builders.boxes import box_text, corners
from data_builders.pickles import read_pickle
from data_builders.sources.refcoco import WHERE


@pytest.mark.parametrize(
    "box, sides, text",
    [
        ((64, 48, 320, 240), (640, 480), "[[100,100,500,500]]"),
        ((1.9, 0.0, 2.0, 3.0), (3, 3), "[[633,000,666,999]]"),  # floored, not rounded; clipped
        ((-5, -5, 700, 500), (640, 480), "[[000,000,999,999]]"),
        ((640, 0, 700, 5), (640, 480), "box_outside_picture"),
        ((-9, 0, 0, 5), (640, 480), "box_outside_picture"),
    ],
)
def test_box_text(box, sides, text):
    assert box_text([box], *sides) == text


@given(st.lists(st.floats(0, 600), min_size=4, max_size=4), st.integers(1, 700),
       st.integers(1, 700))  # fmt: skip
def test_builds_evaluation_and_demo_write_a_box_alike(numbers, width, height):
    (x0, x1), (y0, y1) = sorted(numbers[::2]), sorted(numbers[1::2])
    box = x0, y0, x1, y1
    written = write_box(box, width, height)
    assert drawn.box_text(box, (width, height)) == written
    assert box_text([box], width, height) in (written, "box_outside_picture")


def test_several_boxes_stand_in_one_bracket():
    assert box_text([(0, 0, 5, 5), (5, 5, 10, 10)], 10, 10) == "[[000,000,500,500;500,500,999,999]]"


@given(
    box=st.tuples(*[st.integers(0, 2000)] * 4), width=st.integers(1, 2000),
    height=st.integers(1, 2000),
)  # fmt: skip
def test_boxes_are_three_digits_and_never_rounded_up(box, width, height):
    found = corners(list(box))
    if isinstance(found, str):
        assert box[2] <= box[0] or box[3] <= box[1]
        return
    text = box_text([found], width, height)
    if text == "box_outside_picture":
        assert box[0] >= width or box[1] >= height or 0 in box[2:]
        return
    numbers = text.removeprefix("[[").removesuffix("]]").split(",")
    for number, value, side in zip(numbers, box, (width, height) * 2, strict=True):
        exact = Fraction(value * 1000, side)
        assert len(number) == 3 and int(number) <= exact
        assert exact - int(number) < 1.001 or int(number) == 999


@pytest.mark.parametrize("box", [None, [1, 2, 3], [1, 2, 3, "4"], [1, 2, True, 4], "1234",
                                 [1, 2, float("nan"), 4], [1, 2, float("inf"), 4]])  # fmt: skip
def test_what_is_no_box(box):
    assert corners(box) == "box_not_four_numbers"


# --- RefCOCO ----------------------------------------------------------------------------------


def sentence(text, number=0):
    return {"tokens": text.split(), "raw": text.upper(), "sent_id": number, "sent": text}


def ref(*texts, split="train", ann=11, image=581857, **more):
    sentences = [sentence(text, n) for n, text in enumerate(texts)]
    return {"ref_id": 0, "ann_id": ann, "category_id": 1, "image_id": image, "split": split,
            "file_name": f"COCO_train2014_{image:012d}_16.jpg", "sent_ids": [0],
            "sentences": sentences} | more  # fmt: skip


@pytest.fixture
def refer(root, picture, write_json, tmp_path):
    """A writer of refs as a pickle of protocol 2, and the path of instances.json."""
    picture(root / "train2014" / "COCO_train2014_000000581857.jpg", 1)
    boxes = [{"id": 11, "bbox": [64, 48, 256, 192]}, {"id": 12, "bbox": [10, 10, 0, 5]},
             {"id": 13, "bbox": None}, {"id": 14, "bbox": [700, 0, 5, 5]}]  # fmt: skip
    images = [
        {"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 640, "height": 480},
        {"id": 5, "file_name": "COCO_train2014_000000000005.jpg", "width": 640, "height": 480},
        {"id": 6, "file_name": "COCO_train2014_000000000006.jpg"},
    ]
    instances = write_json("instances.json", {"images": images, "annotations": boxes})

    def write(refs, name="refs(unc).p"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(refs, protocol=2))
        return path

    return write, instances


def test_refcoco(refer, run, root, picture):
    write, instances = refer
    refs = [
        ref("the bus on the left", "bus?", "The Bus.</s>"),
        ref("held", split="val"), ref("held", "out", split="testA"), ref("held", split="testB"),
        ref("no split", split=None),
        ref("empty box", ann=12), ref("no box", ann=13), ref("outside", ann=14),
        ref("unknown box", ann=99), ref("unknown picture", image=99),
        ref("no picture on disk", image=5), ref("no sides", image=6),
        ref(), ref("x", sentences=["no object"]), ref(""), ref("x", sentences=[sentence(" ")]),
        [1],
    ]  # fmt: skip
    report, built, _ = run("refcoco", [write(refs)], instances=[str(instances)])
    assert [r["messages"][1]["content"] for r in built] == ["[[100,100,500,500]]"] * 3
    asked = [r["messages"][0]["content"] for r in built]
    for text, phrase in zip(asked, ["the bus on the left", "bus", "The Bus"], strict=True):
        assert text in {f"<image>\n{ask.format(phrase)}" for ask in WHERE}
    assert {r["style"] for r in built} == {"base"}
    assert {r["images"][0] for r in built} == {"train2014/COCO_train2014_000000581857.jpg"}
    assert report["read"] == 20
    assert report["dropped"] == {
        "box_empty": 1, "box_missing": 1, "box_not_four_numbers": 1, "box_outside_picture": 1,
        "empty_question": 2, "held_out_split": 4, "image_missing": 2,
        "picture_not_in_instances": 1, "record_not_an_object": 2, "split_missing": 1,
        "turns_missing": 1,
    }  # fmt: skip
    picture(root / "COCO_train2014_000000000006.jpg", 2, size=(640, 480))
    _, built, _ = run("refcoco", [write([ref("sized", image=6)])], instances=[str(instances)])
    assert built[0]["messages"][1]["content"] == "[[100,100,500,500]]"  # sides of the picture
    _, built, _ = run("refcoco", [write(refs)], instances=[str(instances)], splits=["testA"])
    assert len(built) == 2 and built[0]["meta"]["split"] == "testA"


def test_refcoco_the_other_way_and_as_json(refer, run, write_json):
    _, instances = refer
    path = write_json("refs.json", [ref("the bus")])
    _, built, _ = run("refcoco", [path], instances=[str(instances)], task="reg")
    assert built[0]["messages"][1]["content"] == "the bus"
    assert "[[100,100,500,500]]" in built[0]["messages"][0]["content"]


def test_refcoco_needs_its_instances(refer, run, tmp_path):
    write, instances = refer
    _, built, _ = run("refcoco", [write([ref("x")])])  # found beside the refs
    assert len(built) == 1
    _, built, _ = run("refcoco", [write([ref("x")]), instances])
    assert len(built) == 1
    with pytest.raises(DataError, match=r"shares pictures between train and val.*refs\(umd\)\.p"):
        run("refcoco", [write([ref("x")], "refs(google).p")])
    alone = tmp_path / "alone"
    alone.mkdir()
    with pytest.raises(DataError, match=r"no instances given.*instances\.json"):
        run("refcoco", [shutil.copy(write([ref("x")]), alone)])
    with pytest.raises(DataError, match="expected a list of refs, found a dict"):
        run("refcoco", [write({"refs": []})], instances=[str(instances)])


def test_shikra(root, run, picture, tmp_path):
    picture(root / "COCO_train2014_000000000009.jpg", 1, size=(200, 100))
    row = {
        "img_path": "COCO_train2014_000000000009.jpg",
        "expression": "a dog",
        "bbox": [20, 10, 100, 50],
        "dataset_name": "refcoco",
        "height": 100,
        "width": 200,
    }
    bare = {k: v for k, v in row.items() if k not in ("height", "width")}
    rows = [row, bare, row | {"bbox": [100, 10, 20, 50]}, row | {"bbox": [1, 2]},
            row | {"expression": None}, bare | {"img_path": "gone.jpg"}, row | {"img_path": None},
            {"img_path": "COCO_train2014_000000000009.jpg"}]  # fmt: skip
    path = tmp_path / "REC_ref3_train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    report, built, _ = run("refcoco", [path], deduplicate=False)
    assert [r["messages"][1]["content"] for r in built] == ["[[100,100,500,500]]"] * 2
    assert report["dropped"] == {
        "box_empty": 1, "box_not_four_numbers": 1, "empty_question": 2, "image_missing": 1,
        "image_name_missing": 1}  # fmt: skip
    assert report["read"] == 8
    held = shutil.copy(path, tmp_path / "REC_refcoco_unc_testA.jsonl")
    with pytest.raises(DataError, match="held_out_split"):
        run("refcoco", [held])


class Touch:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_runs_no_code(protocol, refer, run, tmp_path):
    write, instances = refer
    path = write([])
    path.write_bytes(pickle.dumps([ref("x"), Touch(tmp_path / "owned")], protocol=protocol))
    with pytest.raises(
        DataError, match=r"asks to load \w+\.open, near byte \d+.*nothing of it was"
    ):
        run("refcoco", [path], instances=[str(instances)])
    assert not (tmp_path / "owned").exists()


class Python2(pickle._Pickler):
    """Writes texts as Python 2 did: bytes without an encoding."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_str(self, text):
        raw = text.encode("utf-8", "surrogateescape")
        self.write(pickle.SHORT_BINSTRING + bytes([len(raw)]) + raw)

    dispatch[str] = save_str


def test_a_pickle_of_python_2(refer, run):
    write, instances = refer
    stream = io.BytesIO()
    refs = [ref("the caf\u00e9"), ref("latin \udce9")]  # the second is one byte of Latin-1
    Python2(stream, protocol=2).dump(refs)
    path = write([])
    path.write_bytes(stream.getvalue())
    huge = ref("huge") | {"image_id": 10**9999, "ref_id": 10**9999}
    Python2(stream := io.BytesIO(), protocol=2).dump([*refs, huge])
    path.write_bytes(stream.getvalue())
    report, built, _ = run("refcoco", [path], instances=[str(instances)])
    assert "caf\u00e9" in built[0]["messages"][0]["content"]
    assert report["dropped"] == {"picture_not_in_instances": 1, "text_not_unicode": 1}


def test_a_pickle_cannot_unfold(tmp_path):
    value = ["x"]
    for _ in range(40):
        value = [value, value]
    path = tmp_path / "bomb.p"
    path.write_bytes(pickle.dumps(value, protocol=2))
    with pytest.raises(DataError, match="unfolds to far more"):
        read_pickle(path)
    loop = []
    loop.append(loop)
    path.write_bytes(pickle.dumps(loop, protocol=2))
    with pytest.raises(DataError, match="unfolds"):
        read_pickle(path)
    path.write_bytes(pickle.dumps([{1, 2}], protocol=4))
    with pytest.raises(DataError, match="holds a set"):
        read_pickle(path)


def test_a_truncated_pickle_names_the_byte(refer, run):
    write, instances = refer
    path = write([ref("a bus", "another") for _ in range(50)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=rf"pickle of {len(whole) // 2} bytes, broken near byte \d+"
    ):
        run("refcoco", [path], instances=[str(instances)])


@given(garbage=st.binary(max_size=80), cut=st.integers(0, 400))
def test_garbage_is_never_another_error(garbage, cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("pickle") / "refs.p"
    whole = pickle.dumps([ref("a bus")], protocol=2)
    path.write_bytes(whole[:cut] + garbage or b"x")
    try:
        read_pickle(path)
    except DataError as error:
        assert "refs.p" in str(error)


# --- Flickr30k Entities -----------------------------------------------------------------------


def xml(*objects, size="<size><width>500</width><height>250</height></size>"):
    inner = ""
    for names, box in objects:
        inner += "<object>" + "".join(f"<name>{name}</name>" for name in names)
        if box is None:
            inner += "<scene>1</scene><nobndbox>1</nobndbox>"
        else:
            keys = ("xmin", "ymin", "xmax", "ymax")
            sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, box, strict=True))
            inner += f"<bndbox>{sides}</bndbox>"
        inner += "</object>"
    return f"<annotation><filename>x.jpg</filename>{size}{inner}</annotation>"


@pytest.fixture
def entities(tmp_path, root, picture):
    """A writer of sentences and annotations by id; returns the folder of the repository."""
    home = tmp_path / "flickr30k_entities"

    def write(stem, text, annotation=None):
        (home / "Sentences").mkdir(parents=True, exist_ok=True)
        (home / "Annotations").mkdir(exist_ok=True)
        (home / "Sentences" / f"{stem}.txt").write_text(text)
        if annotation is not None:
            (home / "Annotations" / f"{stem}.xml").write_text(annotation)
        picture(root / f"{stem}.jpg", int(stem))
        return home

    return write


TWO = [(["1"], (50, 25, 250, 125)), (["1", "2"], (250, 125, 500, 250)), (["3"], None)]


def test_flickr30k_entities(entities, run, root):
    entities(
        "36979",
        "[/EN#1/people Two people] near [/EN#2/other/clothing a hat] in [/EN#3/scene a park] .\n"
        "[/EN#0/notvisual They] talk in [/EN#3/scene a park] .\n"
        "Nothing marked .</s>\n"
        "An [/EN#2/other open bracket\n"
        "Unrelated words .\n",
        xml(*TWO),
    )
    entities("5", "[/EN#1/people A man] .\n", xml((["1"], (9, 9, 9, 20))))
    entities("6", "[/EN#1/people A man] .\n[/EN#2/other A] cat .\n",
             xml((["1"], ("x", 9, 9, 20)), size=""))  # fmt: skip
    entities("7", "No annotation .\n")
    entities("8", "[/EN#1/people A man] out .\n", xml((["1"], (600, 9, 700, 20))))
    home = entities("9", "Held .\n" * 5, xml())
    entities("10", "Tested .\n", xml())
    entities("11", "In no list .\n", xml())
    (home / "Annotations" / "12.xml").write_text(xml())
    (home / "train.txt").write_text("36979\n5\n6\n7\n8\n10\n")
    (home / "val.txt").write_text("9\n")
    (home / "test.txt").write_text("10\n")  # in two lists: held out
    (home / "UNRELATED_CAPTIONS").write_text("image caption\n36979.jpg 4\n1.jpg 0\n")
    report, built, _ = run("flickr30k_entities", [home])
    assert [r["messages"][1]["content"] for r in built] == [
        "Two people [[100,100,500,500;500,500,999,999]] near a hat [[500,500,999,999]] in a park .",
        "They talk in a park .",
        "Nothing marked .",
        "A cat .",
    ]
    assert [r["meta"]["orig_id"] for r in built] == ["36979#0", "36979#1", "36979#2", "6#1"]
    assert "[[x0,y0,x1,y1]]" in built[0]["messages"][0]["content"]
    assert "x0" not in built[1]["messages"][0]["content"]
    assert report["dropped"] == {
        "annotation_missing": 1, "annotation_without_sentences": 1, "box_empty": 1,
        "box_not_four_numbers": 1, "box_outside_picture": 1, "held_out_split": 6,
        "markup_broken": 1,
        "split_missing": 1, "unrelated_caption": 1,
    }  # fmt: skip
    assert report["read"] == 18
    assert report["repaired"]["sentence_without_box"] == 3


def test_entities_without_split_lists_say_so(entities, run):
    home = entities("5", "[/EN#1/people A man] .\n", xml((["1"], (0, 0, 250, 250))))
    report, built, result = run("flickr30k_entities", [home / "Sentences", home / "Annotations"])
    assert "nothing says which of these records are held out; list train.txt" in result.summary()
    assert built[0]["messages"][1]["content"] == "A man [[000,000,500,999]] ."
    assert report["repaired"]["split_unknown"] == 1


def test_entities_count_captions_from_zero_or_one(entities, run):
    home = entities("5", "a .\nb .\nc .\nd .\ne .\n", xml())
    released = "# format: <imageID> <sentence number>\n5 2\n5 3\n"  # from one, whatever the numbers
    for numbers, left in (
        ("5 1\n5 5\n", "bcd"), ("5.jpg#0\n5.jpg#3\n", "bce"), ("5.jpg 0\n5 3\n", "bce"),
        (released, "ade"), ("5\n7\n", ""),
    ):  # fmt: skip
        (home / "UNRELATED_CAPTIONS").write_text(numbers)
        if not left:
            with pytest.raises(DataError, match="5 unrelated_caption"):
                run("flickr30k_entities", [home])
            continue
        report, built, _ = run("flickr30k_entities", [home])
        assert "".join(r["messages"][1]["content"][0] for r in built) == left
        assert report["dropped"] == {"unrelated_caption": 5 - len(left)}


@pytest.mark.parametrize(
    "text, complaint",
    [
        (xml(*TWO)[:70], r"5\.xml: not valid XML at byte 70 of 70"),
        ("<annotation>\n<object>\n</obj", r"not valid XML at byte 22 of 27"),
        (
            '<!DOCTYPE a [<!ENTITY b "x">]><annotation>&b;</annotation>',
            "refused, it is no plain XML",
        ),
        ("", "not valid XML at byte 0 of 0"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', r"5\.xml: "),
    ],
)
def test_broken_xml_fails_the_build(text, complaint, entities, run):
    home = entities("5", "A man .\n", text)
    with pytest.raises(DataError, match=complaint):
        run("flickr30k_entities", [home])


def test_entities_mistakes(entities, run, tmp_path):
    home = entities("5", "A man .\n", xml())
    (home / "UNRELATED_CAPTIONS").write_text("5 1\nnonsense\n")
    with pytest.raises(DataError, match=r"UNRELATED_CAPTIONS:2: expected a picture's id"):
        run("flickr30k_entities", [home])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no Sentences/\*\.txt"):
        run("flickr30k_entities", [tmp_path / "empty"])
    (home / "UNRELATED_CAPTIONS").unlink()
    (home / "Sentences" / "5.txt").write_bytes(b"A man .\n[/EN#1/people A m")
    with pytest.raises(DataError, match=r"5\.txt:2: the file ends at byte 25 inside a phrase"):
        run("flickr30k_entities", [home])
    (home / "Sentences" / "5.txt").write_bytes(b"A \xff man")
    with pytest.raises(DataError, match=r"5\.txt: not UTF-8 at byte 2"):
        run("flickr30k_entities", [home])


# --- Visual7W ---------------------------------------------------------------------------------


def v7w(*pairs, split="train", name="v7w_1.jpg"):
    return {"image_id": 1, "filename": name, "split": split, "qa_pairs": list(pairs)}


def qa(question, answer, **more):
    return {"qa_id": 7, "image_id": 1, "question": question, "answer": answer,
            "multiple_choices": [2, 3, 4], "type": "which"} | more  # fmt: skip


def test_visual7w(root, run, write_json, picture):
    picture(root / "v7w_1.jpg", 1, size=(200, 100))
    turned = picture(root / "v7w_2.jpg", 2, size=(100, 200))
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(turned).save(turned, exif=exif)  # shown as 200x100
    (root / "v7w_3.jpg").write_bytes(b"no picture")
    boxes = [
        {"box_id": 1, "x": 20, "y": 10, "width": 80, "height": 40, "name": "cat"},
        {"box_id": 2, "x": -1, "y": -1, "width": 101, "height": 51, "name": "dog"},
        {"box_id": 3, "x": 5, "y": 5, "width": 0, "height": 5},
        {"box_id": "x"},
        5,
    ]
    images = [
        v7w(
            qa("Which cat?", 1),
            qa("Which dog?", 2),
            qa("Which none?", 3),
            qa("Which lost?", 99),
            qa("What is it?", "A cat."),
            qa(None, "A cat."),
            qa("Why?", None),
            "odd",
        ),
        v7w(qa("Which turned cat?", 1), name="v7w_2.jpg"),
        v7w(qa("Which broken?", 1), name="v7w_3.jpg"),
        v7w(qa("Which gone?", 1), name="v7w_4.jpg"),
        v7w(qa("Which?", 1), qa("What?", "x"), split="val"),
        v7w(qa("Which?", 1), split="test"),
        v7w(),
        v7w(qa("Which?", "x"), split=None),
        v7w(qa("Who?", "x"), name=None),
        "odd",
    ]
    path = write_json("dataset_v7w_pointing.json",
                      {"dataset": "visual7w", "boxes": boxes, "images": images})  # fmt: skip
    report, built, _ = run("visual7w", [path])
    ask = "answer in [[x0,y0,x1,y1]] format."
    assert [(r["style"], *(m["content"] for m in r["messages"])) for r in built] == [
        ("base", f"<image>\nWhich cat? {ask}", "[[100,100,500,500]]"),
        ("base", f"<image>\nWhich dog? {ask}", "[[000,000,500,500]]"),
        ("vqa", "<image>\nWhat is it?", "A cat."),
        ("base", f"<image>\nWhich turned cat? {ask}", "[[100,100,500,500]]"),
    ]
    assert report["dropped"] == {
        "box_empty": 1, "box_missing": 1, "empty_answer": 1, "empty_question": 1,
        "held_out_split": 3, "image_missing": 1, "image_name_missing": 1, "image_not_an_image": 1,
        "record_not_an_object": 2, "split_missing": 1, "turns_missing": 1,
    }  # fmt: skip
    assert report["read"] == 18
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"byte {path.stat().st_size}, where the file ends"):
        run("visual7w", [path])
