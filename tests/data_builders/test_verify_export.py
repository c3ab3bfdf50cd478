"""A build can be checked later, and read by the trainers it is exported for."""

import json

import pytest

from cogvlm_sft.errors import DataError
from data_builders.export import TARGETS, export
from data_builders.manifest import verify


@pytest.fixture
def built(root, picture, run, write_json):
    rows = []
    for number in range(5):
        picture(root / f"{number}.jpg", number)
        rows.append({"image": f"{number}.jpg", "conversations": [
            {"from": "human", "value": f"What is {number}?\n<image>"},
            {"from": "gpt", "value": f"It is {number}."}]})  # fmt: skip
    rows.append({"conversations": [{"from": "human", "value": "Hi"},
                                   {"from": "gpt", "value": "Hello."}]})  # fmt: skip
    _, _, result = run("llava_instruct", [write_json("a.json", rows)])
    return result.out


def test_a_sound_build(built, root):
    report = verify(built)
    assert report.ok and (report.conversations, report.images) == (6, 5)
    assert report.summary() == "6 conversations, 5 pictures opened: sound"


def test_what_verify_finds(built, root):
    picture = root / "3.jpg"
    picture.write_bytes(picture.read_bytes()[:-300])
    (root / "4.jpg").unlink()
    shard = next(built.glob("conversations-*"))
    lines = shard.read_text().splitlines()
    shard.write_text("\n".join([*lines, lines[0], "{"]) + "\n")
    (built / "conversations-00009-of-00001.jsonl").write_text("")
    report = verify(built, root)
    text = "\n".join(report.problems)
    assert not report.ok and len(report.problems) == 7
    for part in (
        "sha256 differs",
        "8 conversations, the manifest says 6",
        "occurs twice",
        "3.jpg: image_truncated",
        "4.jpg",
        "not valid JSON",
        "not in the manifest",
    ):
        assert part in text  # fmt: skip
    shard.unlink()
    assert f"{shard.name}: missing" in verify(built, root).problems


def test_verify_wants_a_build(tmp_path):
    with pytest.raises(DataError, match="is it a build folder"):
        verify(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="not a manifest"):
        verify(tmp_path)


def test_trl_export_loads_with_datasets(built, root, tmp_path):
    import datasets

    assert export(built, "trl", tmp_path / "trl", root) == 6
    loaded = datasets.Dataset.from_json(
        str(tmp_path / "trl" / "train.jsonl"), cache_dir=str(tmp_path / "cache")
    )
    assert loaded.column_names == ["images", "messages"]
    rows = list(loaded)
    assert sorted(len(row["images"]) for row in rows) == [0, 1, 1, 1, 1, 1]
    assert all("<image>" not in m["content"] for row in rows for m in row["messages"])
    assert all(path.startswith(str(root)) for row in rows for path in row["images"])


def test_other_exports_hold_as_many_markers_as_pictures(built, tmp_path):
    for target, name in (("llama-factory", "cogvlm_sft.jsonl"), ("ms-swift", "train.jsonl")):
        assert export(built, target, tmp_path / target) == 6
        for line in (tmp_path / target / name).read_text().splitlines():
            row = json.loads(line)
            text = "".join(m["content"] for m in row["messages"])
            assert text.count("<image>") == len(row["images"])
    info = json.loads((tmp_path / "llama-factory" / "dataset_info.json").read_text())
    assert info["cogvlm_sft"]["columns"] == {"messages": "messages", "images": "images"}


def test_llava_export_builds_again_to_the_same_texts(built, tmp_path, run, read):
    export(built, "llava", tmp_path / "llava")
    before = sorted((r["images"], [m["content"] for m in r["messages"]]) for r in read(built))
    _, again, _ = run("llava_instruct", [tmp_path / "llava" / "train.json"])
    assert sorted((r["images"], [m["content"] for m in r["messages"]]) for r in again) == before


def test_export_mistakes(built, tmp_path):
    with pytest.raises(DataError, match="known are trl, llama-factory, ms-swift, llava"):
        export(built, "axolotl", tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(DataError, match="not an empty folder"):
        export(built, "trl", tmp_path / "full")
    with pytest.raises(DataError, match="holds no conversations"):
        export(tmp_path / "full", "trl", tmp_path / "new")
    assert not (tmp_path / "new").exists() and len(TARGETS) == 4
