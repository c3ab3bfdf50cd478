"""One's own questions in every form: tables, JSON, nested turns, and a labelled folder."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cogvlm_sft.errors import DataError, RecipeError
from data_builders.images import ImageFinder
from data_builders.recipe import SourceEntry
from data_builders.source import RecordStage
from data_builders.sources.custom_vqa import CustomVQA


@pytest.fixture
def photos(root, picture):
    for number, name in enumerate(["a.jpg", "b.png", "c.jpg"]):
        picture(root / name, number)
    return root


def texts(built):
    return [(r["images"], [m["content"] for m in r["messages"]]) for r in built]


def test_csv(photos, run, tmp_path):
    path = tmp_path / "q.csv"
    path.write_bytes(
        b"\xef\xbb\xbfimage,question,answer\r\n"
        b'a.jpg,"What, then?","He said ""no"""\r\n'
        b"a.jpg,Second question?,=cmd|' /C calc'!A0\r\n"
        b"b.jpg,Wrong ending?,yes\r\n"
        b"c.jpg,\xe7\x8c\xab?,\xe6\x98\xaf\r\n"
        b"a.jpg,No answer?,\r\n"
        b",No picture?,x\r\n"
        b"z.jpg,Missing?,x\r\n"
        b"a.jpg,too few\r\n"
        b"a.jpg,too,many,cells\r\n"
        b"../a.jpg,Out?,x\r\n"
    )
    report, built, result = run("custom_vqa", [path])
    assert texts(built) == [
        (["a.jpg"], ["<image>\nWhat, then?", 'He said "no"']),
        (["b.png"], ["<image>\nWrong ending?", "yes"]),
        (["c.jpg"], ["<image>\n猫?", "是"]),
    ]
    assert report["read"] == 10 and report["kept"] == 3
    assert report["dropped"] == {
        "cell_count_differs": 2, "empty_answer": 1, "image_missing": 1, "image_name_missing": 1,
        "image_path_unsafe": 1, "spreadsheet_formula": 1,
    }  # fmt: skip
    page = (result.out / "report.html").read_text()
    assert "_line&#34;:10" in page or "_line&quot;:10" in page  # where to look in the table
    assert {r["style"] for r in built} == {"vqa"}


@pytest.mark.parametrize(
    "cell, formula",
    [
        ("=1+1", True), ("=cmd|' /C calc'!A0", True), ("=HYPERLINK(A1)", True), ("@SUM(1)", True),
        ("+cmd|' /C calc'!A0", True), ("-2+3+cmd|'/C calc'!A0", True), ("=$A$1", True),
        (" =B2", True), ("+SUM(1)", True),
        ("-5", False), ("+3 C", False), ("- item (one)", False), ("=", False),
        ("== equal ==", False),
        ("@home", False), ("-5 (minus five)", False), ("a = b + c", False), ("=5", False),
    ],
)  # fmt: skip
def test_spreadsheet_formulas(cell, formula, photos, run, tmp_path):
    path = tmp_path / "q.tsv"
    path.write_text(f"image\tquestion\tanswer\na.jpg\tq\t{cell}\nb.png\tq\tx\n")
    report, built, _ = run("custom_vqa", [path])
    assert report["dropped"] == ({"spreadsheet_formula": 1} if formula else {})
    _, built, _ = run("custom_vqa", [path], clean=False)
    assert built[0]["messages"][1]["content"] == cell.strip()


def test_tsv_with_other_columns_and_style(photos, run, tmp_path):
    path = tmp_path / "q.tsv"
    path.write_text("file\task\treply\nimg/a.jpg\tq\t3\n")
    _, built, _ = run(
        "custom_vqa",
        [path],
        columns={"image": "file", "question": "ask", "answer": "reply"},
        style="chat",
    )
    assert texts(built) == [(["a.jpg"], ["<image>\nq", "3"])]
    assert built[0]["style"] == "chat"


def test_rows_of_a_conversation_become_its_turns(photos, run, tmp_path):
    path = tmp_path / "q.csv"
    path.write_text(
        "image,question,answer,conversation,turn\n"
        "a.jpg,second,2,x,2\nb.png,only,o,y,1\na.jpg,first,1,x,1\nc.jpg,alone,l,,\n"
        "a.jpg,p,1,z,1\nb.png,q,2,z,2\n"
    )
    report, built, _ = run("custom_vqa", [path])
    assert texts(built) == [
        (["a.jpg"], ["<image>\nfirst", "1", "second", "2"]),
        (["b.png"], ["<image>\nonly", "o"]),
        (["c.jpg"], ["<image>\nalone", "l"]),
    ]
    assert (report["read"], report["kept"], report["conversations"]) == (6, 4, 3)
    assert report["dropped"] == {"conversation_with_several_images": 2}


def test_turns_out_of_order_and_late_conversations(photos, run, tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"image": "c.jpg", "question": "alone", "answer": "l"}]  # has no conversation
    for turn in ("2", "x", "1"):
        rows.append({"image": "a.jpg", "question": f"q{turn}", "answer": "a", "conversation": 5,
                     "turn": turn})  # fmt: skip
    rows.append({"image": "a.jpg", "question": "q", "answer": "", "conversation": "6"})
    rows.append({"image": "", "question": "r", "answer": "a", "conversation": "6"})
    path.write_text("\n".join(map(json.dumps, rows)))
    report, built, _ = run("custom_vqa", [path])
    assert texts(built) == [
        (["c.jpg"], ["<image>\nalone", "l"]),
        (["a.jpg"], ["<image>\nq2", "a", "qx", "a", "q1", "a"]),
        (["a.jpg"], ["<image>\nr", "a"]),
    ]
    assert (report["read"], report["kept"]) == (6, 5)
    assert report["dropped"] == {"empty_answer": 1}
    assert report["repaired"] == {"turn_not_a_number": 1}


def test_rows_that_say_they_are_held_out_stay_out(photos, run, tmp_path):
    path = tmp_path / "q.csv"
    rows = [
        f"a.jpg,q{n},{n},{split}" for n, split in enumerate(["train", "Val", " test ", "", "x"])
    ]
    path.write_text("\n".join(["image,question,answer,split", *rows]))
    report, built, _ = run("custom_vqa", [path])
    assert [r["messages"][1]["content"] for r in built] == ["0", "3"]
    assert report["dropped"] == {"held_out_split": 2, "unknown_split": 1}
    _, built, _ = run("custom_vqa", [path], splits=["test"])
    assert [r["messages"][1]["content"] for r in built] == ["2", "3"]
    path.write_text("image,ask,answer,conversation,fold\na.jpg,p,1,x,train\na.jpg,q,2,x,val\n")
    report, built, _ = run("custom_vqa", [path], columns={"question": "ask", "split": "fold"})
    assert texts(built) == [(["a.jpg"], ["<image>\np", "1"])]
    assert report["dropped"] == {"held_out_split": 1}


@pytest.mark.parametrize(
    "word",
    ["eval", "heldout", "held-out", "held_out", "dev_test", "test-dev", "val 2"],
)
def test_words_for_held_out_splits(word, photos, run, write_json):
    rows = [{"image": "a.jpg", "question": q, "answer": "a", "split": split}
            for q, split in (("p", word), ("q", "train"), ("r", 3), ("s", None))]  # fmt: skip
    report, built, _ = run("custom_vqa", [write_json("q.json", rows)])
    assert [r["messages"][0]["content"] for r in built] == ["<image>\nq", "<image>\ns"]
    assert report["dropped"] == {"held_out_split": 1, "unknown_split": 1}


def test_a_file_of_one_s_own_is_meant_whatever_its_name(photos, run, write_json):
    rows = [{"image": "a.jpg", "question": f"q{n}", "answer": "a"} for n in range(2)]
    assert run("custom_vqa", [write_json("my_test.json", rows)])[0]["kept"] == 2
    held = write_json("train.json", [row | {"split": "test"} for row in rows])
    with pytest.raises(DataError, match=r"2 held_out_split; .*name the split .* `splits`"):
        run("custom_vqa", [held])
    assert run("custom_vqa", [held], splits=["test"])[0]["kept"] == 2


def test_a_conversation_loses_bad_rows_alone(photos, run, tmp_path):
    rows = [
        {"image": "a.jpg", "question": "q1", "answer": " </s>", "conversation": 1},
        {"question": "q2", "answer": "a2", "conversation": 1},
        {"question": "q3", "answer": {"x": 1}, "conversation": 1},
        {"question": "q4", "answer": [{"answer": "b"}, {"answer": "b"}, "c"], "conversation": 1},
        {"question": "q5", "answer": "", "conversation": 2},
        {"_rows": 3, "conversation": None},
    ]
    path = tmp_path / "q.json"
    path.write_text(json.dumps(rows))
    report, built, _ = run("custom_vqa", [path])
    assert texts(built) == [(["a.jpg"], ["<image>\nq2", "a2", "q4", "b"])]
    assert (report["read"], report["kept"]) == (6, 2)
    assert report["dropped"] == {"answer_not_a_text": 1, "empty_answer": 2, "empty_question": 1}


def test_json_lines_with_answers_and_turns(photos, run, tmp_path):
    rows = [
        {"image": "a.jpg", "question": "q", "answer": ["b", "a", "a"]},
        {"image": ["b.png"], "question": "q", "answer": 3.0, "id": 7},
        {"image": "c.jpg", "turns": [{"question": "q1", "answer": "a1"}, ["q2", True]]},
        {"image": "c.jpg", "messages": [{"role": "user", "content": "<image>hi"},
                                        {"role": "assistant", "content": "yo</s>"}]},
        {"image": {"path": "c.jpg", "bytes": None}, "question": "of datasets", "answer": "a"},
        {"image": ["a.jpg", "b.png"], "question": "q", "answer": "a"},
        {"image": "c.jpg", "question": {"x": 1}, "answer": "a"},
        {"image": "c.jpg", "question": "q", "answer": float("nan")},
        {"image": "c.jpg", "question": "q", "answer": "half \ud83d"},
        ["a.jpg"],
    ]  # fmt: skip
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    report, built, _ = run("custom_vqa", [path])
    assert texts(built) == [
        (["a.jpg"], ["<image>\nq", "a"]),
        (["b.png"], ["<image>\nq", "3"]),
        (["c.jpg"], ["<image>\nq1", "a1", "q2", "yes"]),
        (["c.jpg"], ["<image>\nhi", "yo"]),
        (["c.jpg"], ["<image>\nof datasets", "a"]),
    ]
    assert built[1]["meta"]["orig_id"] == "7"
    assert report["dropped"] == {
        "answer_not_a_text": 1, "question_not_a_text": 1, "record_not_an_object": 1,
        "several_images": 1, "text_not_unicode": 1,
    }  # fmt: skip


@pytest.mark.parametrize("shape", ["list", "data", "lines"])
def test_json_shapes(shape, photos, run, tmp_path):
    row = {"image": "a.jpg", "question": "q", "answer": "a"}
    content = {"list": [row], "data": {"version": 1, "data": [row]}, "lines": row}[shape]
    text = json.dumps(content, indent=2 if shape != "lines" else None)
    path = tmp_path / "q.json"
    path.write_text(text if shape != "lines" else f"{text}\n{text.replace('a.jpg', 'b.png')}\n")
    _, built, _ = run("custom_vqa", [path])
    assert len(built) == (2 if shape == "lines" else 1)


def test_parquet(photos, run, tmp_path):
    table = pyarrow.table(
        {"image": ["a.jpg", "b.png", None], "question": ["q1", "q2", "q3"], "answer": [1, 2, 3]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "q.parquet")
    report, built, _ = run("custom_vqa", [tmp_path / "q.parquet"])
    assert [r["messages"][1]["content"] for r in built] == ["1", "2"]
    assert report["dropped"] == {"image_name_missing": 1}
    cut = tmp_path / "cut.parquet"
    cut.write_bytes((tmp_path / "q.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut.parquet: not a readable Parquet file of \d+ bytes"):
        run("custom_vqa", [cut])


def test_labelled_folder(root, run, picture):
    for number, name in enumerate(["XK42.png", "deep/7h3q.jpg", ".hidden.png"]):
        picture(root / name, number)
    report, built, _ = run("custom_vqa", [])
    assert sorted(texts(built)) == [
        (["XK42.png"], ["<image>\nCAPTCHA:", "XK42"]),
        (["deep/7h3q.jpg"], ["<image>\nCAPTCHA:", "7h3q"]),
    ]
    assert report["read"] == 2


def test_folders_as_labels(root, run, picture):
    for number, name in enumerate(["cat/1.png", "cat/2.png", "dog_7/1.png"]):
        picture(root / name, number)
    _, built, _ = run("custom_vqa", [], label_from="folder", question="Which animal?")
    assert sorted((r["images"][0], r["messages"][1]["content"]) for r in built) == [
        ("cat/1.png", "cat"), ("cat/2.png", "cat"), ("dog_7/1.png", "dog_7")]  # fmt: skip
    _, built, _ = run("custom_vqa", [], label_from="folder", label_pattern="^([a-z]+)")
    assert sorted(r["messages"][1]["content"] for r in built) == ["cat", "cat", "dog"]


def test_label_pattern_and_question(root, run, picture):
    for number, name in enumerate(["cat_001.png", "dog_7.png", "odd.png"]):
        picture(root / name, number)
    report, built, _ = run("custom_vqa", [], label_pattern="^([a-z]+)_", question="Which animal?")
    assert sorted(r["messages"][1]["content"] for r in built) == ["cat", "dog"]
    assert {r["messages"][0]["content"] for r in built} == {"<image>\nWhich animal?"}
    assert report["dropped"] == {"label_pattern_does_not_match": 1}


def test_mistakes(photos, run, tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("picture,question,answer\na.jpg,q,a\n")
    with pytest.raises(DataError, match="no column 'image'; found 'picture', 'question'"):
        run("custom_vqa", [path])
    path.write_text("image;question;answer\na.jpg;q;a\n")
    with pytest.raises(DataError, match=r"q\.csv:1: no column 'image'.*delimiter"):
        run("custom_vqa", [path])
    path.write_text("image,question,answer,answer\na.jpg,q,a,b\n")
    with pytest.raises(DataError, match=r"q\.csv:1: column 'answer' is there twice"):
        run("custom_vqa", [path])
    path.write_text('image,question,answer\na.jpg,q,"cut')
    with pytest.raises(DataError, match=r"q.csv:2: broken table .* truncated at byte 34"):
        run("custom_vqa", [path])
    path.write_text('image,question,answer\na.jpg,q,"two\nlines"\nb.png,cut')
    with pytest.raises(DataError, match=r"q\.csv:4: the file ends at byte 51 .*2 of 3 cells"):
        run("custom_vqa", [path])
    path.write_bytes(b"image,question,answer\na.jpg,q,\xff\n")
    with pytest.raises(DataError, match=r"q\.csv:2: not UTF-8 at byte 30"):
        run("custom_vqa", [path])
    path.write_text("")
    with pytest.raises(DataError, match="empty"):
        run("custom_vqa", [path])
    other = tmp_path / "q.xlsx"
    other.write_text("x")
    with pytest.raises(DataError, match="cannot tell its format"):
        run("custom_vqa", [other])
    with pytest.raises(RecipeError, match="unknown key 'colums'; did you mean 'columns'"):
        run("custom_vqa", [path], colums={"image": "x"})
    with pytest.raises(RecipeError, match="not a regular expression"):
        run("custom_vqa", [], label_pattern="(")


def test_a_late_conversation_column_is_an_error(photos, run, tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"image": "a.jpg", "question": f"q{n}", "answer": "a"} for n in range(2001)]
    rows[-1]["conversation"] = 5
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"q\.jsonl: record 2000 has 'conversation', which no"):
        run("custom_vqa", [path])


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    ending=st.sampled_from(["csv", "tsv", "jsonl", "parquet"]), cut=st.floats(0, 1),
    over=st.binary(max_size=8), whole=st.booleans(),
)  # fmt: skip
def test_damaged_tables_are_a_data_error(ending, cut, over, whole, tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / f"q.{ending}"
    rows = [{"image": "a.jpg", "question": f"q {n}", "answer": f'"{n}'} for n in range(4)]
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        between = "," if ending == "csv" else "\t"
        cells = [
            ["image", "question", "answer"],
            *([f'"{v}"' for v in ("a", "q", 1)] for _ in "1234"),
        ]
        path.write_text("\n".join(between.join(row) for row in cells) + "\n")
    raw = path.read_bytes()
    at = int(cut * len(raw))
    path.write_bytes(raw[:at] + over + (raw[at + len(over) :] if whole else b""))
    source = CustomVQA(SourceEntry(source="custom_vqa", name="mine", annotations=[path]))
    finder = ImageFinder(path.parent, [], must_exist=False)
    stage = RecordStage(source, finder, 0)
    try:
        done = [stage.run(batch) for batch in source.batches(finder)]
    except DataError as error:
        assert path.name in str(error)
        return
    for part in done:
        assert part.read == sum(part.units) + part.drops.total()


def test_an_empty_folder_is_an_error(root, run):
    with pytest.raises(DataError, match="no picture found"):
        run("custom_vqa", [])


def test_pictures_inside_of_a_parquet_table(picture, run, root, tmp_path):
    """As the Hub holds them: written out once, one file for the rows about one picture."""
    held = [picture(tmp_path / name, number).read_bytes()
            for number, name in enumerate(["a.jpg", "b.png"])]  # fmt: skip
    cells = [{"bytes": held[place], "path": None} for place in (0, 1, 0)]
    table = {"image": cells, "question": ["q1", "q2", "q3"], "answer": ["1", "2", "3"]}
    file = root / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    _, built, result = run("custom_vqa", [file])
    first, second, third = (record["images"][0] for record in built)
    assert first == third != second
    assert sorted((root / name).read_bytes() for name in (first, second)) == sorted(held)
    assert len(list((root / "train_pictures").glob("[!.]*"))) == 2
    written = (root / first).stat().st_mtime_ns
    _, again, _ = run("custom_vqa", [file], out=str(tmp_path / "again"))
    assert again == built
    assert (root / first).stat().st_mtime_ns == written
    # Another table of that name, another picture.
    pyarrow.parquet.write_table(pyarrow.table(table).slice(1, 1), file)
    _, other, _ = run("custom_vqa", [file], out=str(tmp_path / "other"))
    assert [record["images"] for record in other] == [[second]]
    assert not (root / first).exists()
    assert result.manifest["pictures"]["checked"] == 2


@pytest.mark.parametrize("names", [("1.parquet", "2.parquet"), ("a/t.parquet", "b/t.parquet")])
def test_tables_that_hold_the_same_picture(names, picture, run, root, tmp_path):
    held = picture(tmp_path / "a.png", 0).read_bytes()
    files = [root / name for name in names]
    for number, file in enumerate(files):
        file.parent.mkdir(exist_ok=True)
        table = {"image": [{"bytes": held, "path": None}], "question": [f"q{number}"],
                 "answer": ["x"]}  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table(table), file)
    _, built, _ = run("custom_vqa", files)
    folders = {str((root / record["images"][0]).parent.relative_to(root)) for record in built}
    assert folders == {name.replace(".parquet", "_pictures") for name in names}


def test_a_damaged_picture_inside_of_a_table_is_dropped_alone(picture, run, root, tmp_path):
    good = picture(tmp_path / "a.png", 0).read_bytes()
    cells = [{"bytes": good, "path": "x"}, {"bytes": good[:200], "path": "y"}, None,
             {"bytes": b"", "path": "z"}]  # fmt: skip
    table = {"image": cells, "question": list("abcd"), "answer": list("1234")}
    pyarrow.parquet.write_table(pyarrow.table(table), root / "t.parquet")
    report, built, _ = run("custom_vqa", [root / "t.parquet"])
    assert [record["messages"][1]["content"] for record in built] == ["1"]
    assert sum(report["dropped"].values()) == 3


@pytest.mark.parametrize("inside", [True, False])
def test_the_layout_of_other_trainers(inside, picture, run, root, tmp_path):
    """`messages` with words or parts and a list of `images`, in Parquet and in JSON Lines."""
    path = picture(root / "a.png", 0)
    cell = (
        {"bytes": path.read_bytes(), "path": "a.png"}
        if inside
        else {"bytes": None, "path": "a.png"}
    )
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    rows = [
        {"images": [cell], "messages": [{"role": "user", "content": parts},
                                        {"role": "assistant", "content": parts[1:]}]},
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "t.parquet")
    _, built, _ = run("custom_vqa", [root / "t.parquet"])
    assert [m["content"] for m in built[0]["messages"]] == ["<image>\nWhat?", "What?"]
    assert (root / built[0]["images"][0]).read_bytes() == path.read_bytes()
    assert (root / "t_pictures").exists() == inside
    said = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "this"}]
    line = {"images": ["a.png"], "messages": said}
    lines = tmp_path / "swift.jsonl"
    lines.write_text(json.dumps(line) + "\n")
    _, built, _ = run("custom_vqa", [lines], out=str(tmp_path / "lines"))
    assert texts(built) == [(["a.png"], ["<image>\nWhat?", "this"])]
