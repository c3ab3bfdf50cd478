"""The build as a whole: same bytes always, nothing half-written, nothing lost, mistakes named."""

import errno
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from hashlib import blake2b
from pathlib import Path

import pytest
import yaml
from PIL import Image

import cogvlm_sft
from cogvlm_sft.conversation import read_conversations
from cogvlm_sft.errors import DataError, RecipeError
from data_builders import annotations, pipeline, record_shards
from data_builders.build import build, build_recipe
from data_builders.catalogue import list_sources
from data_builders.recipe import load_recipe, parse_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus(root, picture, write_json, tmp_path):
    """Two sources of a few hundred records; returns the recipe's content."""
    for number in range(12):
        picture(root / "coco" / f"{number:012d}.jpg", number)
        picture(root / "vg" / f"{number + 500}.jpg", number + 20)
    (root / "coco" / "000000000011.jpg").write_bytes(b"no picture")
    llava = [
        {"id": f"{n % 13:012d}", "image": f"{n % 13:012d}.jpg", "conversations": [
            {"from": "human", "value": f"<image>\nQuestion {n}?"},
            {"from": "gpt", "value": f"Answer {n // 2} 猫"}]}
        for n in range(300)
    ]  # fmt: skip
    lrv = [
        {"image_id": str(n % 12 + 500), "question": f"Is it {n}?", "answer": f"No, {n}."}
        for n in range(200)
    ]
    write_json("llava.json", llava)
    write_json("lrv1.json", lrv[:120])
    write_json("lrv2.json", lrv[120:])
    return {
        "out": str(tmp_path / "build"),
        "image_root": str(root),
        "seed": 3,
        "shard_size": 150,
        "workers": 1,
        "sources": [
            {"source": "llava_instruct", "annotations": [str(tmp_path / "llava.json")],
             "images": [str(root / "coco")]},
            {"source": "lrv_instruction",
             "annotations": [str(tmp_path / "lrv1.json"), str(tmp_path / "lrv2.json")],
             "images": [str(root / "vg")]},
        ],
    }  # fmt: skip


@pytest.fixture
def recipe(corpus, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(corpus))
    return path


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_counts_and_shards(recipe, tmp_path):
    result = build(recipe)
    names = sorted(path.name for path in result.out.iterdir())
    assert names == [
        "conversations-00000-of-00004.jsonl", "conversations-00001-of-00004.jsonl",
        "conversations-00002-of-00004.jsonl", "conversations-00003-of-00004.jsonl",
        "manifest.json", "report.html",
    ]  # fmt: skip
    manifest = json.loads((result.out / "manifest.json").read_text())
    assert manifest["sources"]["llava_instruct"]["dropped"] == {
        "image_missing": 23, "image_not_an_image": 23,
    }  # fmt: skip
    assert manifest["totals"] == {
        "read": 500, "kept": 454, "conversations": 454, "questions": 454, "dropped": 46,
    }  # fmt: skip
    assert [f["conversations"] for f in manifest["files"]] == [150, 150, 150, 4]
    assert {len(i["sha256"]) for i in manifest["inputs"]} == {64}
    assert len({c.id for c in read_conversations(result.out)}) == 454
    first = [c.source for c in read_conversations(result.out)][:150]
    assert 50 < first.count("llava_instruct") < 110  # 254 of 454: the sources are mixed
    assert "llava_instruct" in result.summary() and "454 conversations" in result.summary()


def test_same_bytes_for_any_worker_count_hash_seed_and_file_order(
    recipe, corpus, tmp_path, monkeypatch
):
    first = digest(build(recipe).out)
    monkeypatch.setattr(annotations, "CHUNK", 2000)
    monkeypatch.setattr(record_shards, "PARALLEL_FROM", 0)
    assert digest(build(recipe, [f"out={tmp_path}/two", "workers=2"]).out) == first
    monkeypatch.undo()
    corpus["sources"][1]["annotations"].reverse()
    turned = tmp_path / "turned.yaml"
    turned.write_text(yaml.safe_dump(corpus | {"out": str(tmp_path / "three")}))
    done = subprocess.run(
        [sys.executable, "-c", f"from data_builders.build import build; build({str(turned)!r})"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    third = digest(tmp_path / "three")
    assert third == first
    other = digest(build(recipe, [f"out={tmp_path}/four", "seed=4"]).out)
    assert (
        other["conversations-00000-of-00004.jsonl"] != first["conversations-00000-of-00004.jsonl"]
    )


def test_a_further_source_moves_no_other_conversation(recipe, corpus, tmp_path):
    both = [c.id for c in read_conversations(build(recipe).out)]
    corpus["sources"].pop()
    recipe.write_text(yaml.safe_dump(corpus))
    alone = [c.id for c in read_conversations(build(recipe).out)]
    assert [identity for identity in both if identity.startswith("llava")] == alone


def test_quotas(recipe):
    """Exactly so many conversations, from a larger source and from a smaller one."""
    result = build(recipe, ["sources.0.quota=120", "sources.lrv_instruction.quota=510"])
    rows = result.manifest["sources"]
    assert rows["llava_instruct"]["conversations"] == 120
    assert rows["llava_instruct"]["dropped"]["over_quota"] == 134
    assert (rows["lrv_instruction"]["kept"], rows["lrv_instruction"]["conversations"]) == (200, 510)
    ids = [c.id for c in read_conversations(result.out) if c.source == "lrv_instruction"]
    seen = Counter(identity.split("~")[0] for identity in ids)
    assert len(set(ids)) == 510 and set(seen.values()) == {2, 3}
    # which ones are kept does not depend on the other source
    alone = build(recipe, ["sources.0.quota=120", "sources.1.max=1"])
    both = {c.id for c in read_conversations(result.out) if c.source == "llava_instruct"}
    assert both == {c.id for c in read_conversations(alone.out) if c.source == "llava_instruct"}
    with pytest.raises(RecipeError, match="`quota` says it all; leave out `max` and `weight`"):
        build(recipe, ["sources.0.quota=120", "sources.0.weight=2"])


def test_caps_and_weights(recipe):
    result = build(recipe, ["sources.llava_instruct.max=100", "sources.lrv_instruction.weight=1.5"])
    rows = result.manifest["sources"]
    assert rows["llava_instruct"]["dropped"]["over_max"] == 154
    assert rows["llava_instruct"]["conversations"] == 100
    assert (rows["lrv_instruction"]["kept"], rows["lrv_instruction"]["conversations"]) == (200, 300)
    ids = [c.id for c in read_conversations(result.out)]
    assert len(set(ids)) == 400 and sum(identity.endswith("~2") for identity in ids) == 100
    half = build(recipe, ["sources.1.weight=0.25"])
    assert half.manifest["sources"]["lrv_instruction"]["dropped"] == {"left_out_by_weight": 150}


@pytest.mark.parametrize(
    "weight, most, written, dropped",
    [
        (2, 3, 3, {"over_max": 197}),  # at most three are written, not three twice
        (2, 250, 250, {}),
        (0.5, 30, 30, {"left_out_by_weight": 100, "over_max": 70}),
        (0.5, 150, 100, {"left_out_by_weight": 100}),
    ],
)
def test_a_cap_holds_after_the_weight(weight, most, written, dropped, recipe):
    row = build(recipe, [f"sources.1.weight={weight}", f"sources.1.max={most}"]).manifest[
        "sources"
    ]["lrv_instruction"]
    assert (row["conversations"], row["dropped"]) == (written, dropped)


def test_a_quota_that_nothing_can_fill_is_an_error(root, picture, write_json, tmp_path):
    picture(root / "1.jpg", 1)
    file = write_json("q.json", [{"image": "1.jpg", "question": "q", "answer": "a"}])
    sources = [{"source": "custom_vqa", "name": name, "annotations": [str(file)]} for name in "ab"]
    sources[1]["quota"] = 50
    content = {"out": str(tmp_path / "out"), "image_root": str(root), "sources": sources}
    with pytest.raises(DataError, match=r"source b: a quota of 50, .*1 records .*1 duplicate"):
        build_recipe(parse_recipe(content, "test"))


def test_pictures_are_counted_that_the_build_shows(root, picture, run, write_json):
    for number in range(5):
        picture(root / f"{number}.jpg", number)
    (root / "5.jpg").write_bytes(b"no picture")
    rows = [{"image": f"{n}.jpg", "question": "q", "answer": "a"} for n in range(6)]
    path = write_json("q.json", rows)
    pictures = run("custom_vqa", [path])[2].manifest["pictures"]
    assert (pictures["distinct"], pictures["seen"]) == (5, 6)
    _, _, one = run("custom_vqa", [path], max=1)
    assert one.manifest["pictures"]["distinct"] == 1
    card = (one.out / "report.html").read_text()
    assert re.search(r"<b>1</b>\s*<span>different pictures", card)


def test_twenty_examples_of_each_reason(root, picture, run, write_json):
    picture(root / "1.jpg", 1)
    (root / "2.jpg").write_bytes((root / "1.jpg").read_bytes())
    rows = [{"image": f"{n}.jpg", "question": f"q{q}", "answer": "a"}
            for q in range(30) for n in (1, 1, 2)]  # fmt: skip
    report, _, result = run("custom_vqa", [write_json("q.json", rows)])
    assert report["dropped"] == {"duplicate": 60}  # same path, and another file of the same bytes
    assert len(result.manifest["examples"]["custom_vqa"]) == 20
    rows = [{"image": "1.jpg", "question": "q", "answer": "a", "conversation": n // 10,
             "style": "none"} for n in range(300)]  # fmt: skip
    rows.append({"image": "1.jpg", "question": "fine?", "answer": "a", "conversation": ""})
    report, _, result = run("custom_vqa", [write_json("r.json", rows)])
    assert report["dropped"] == {"unknown_style": 300}  # thirty conversations of ten rows
    assert len(result.manifest["examples"]["custom_vqa"]) == 20


def test_exact_and_near_duplicates(root, picture, run, write_json):
    smooth = Image.radial_gradient("L").crop((20, 60, 220, 220))
    smooth.save(root / "1.png")
    smooth.resize((180, 144)).save(root / "2.png")
    picture(root / "3.png", 9, size=(200, 160))

    def row(image, question="What?"):
        return {"image": image, "question": question, "answer": "A thing."}

    rows = [row("1.png"), row("1.png"), row("2.png"), row("2.png", "Other?"), row("3.png")]
    path = write_json("q.json", rows)
    exact, _, _ = run("custom_vqa", [path])
    assert exact["dropped"] == {"duplicate": 1}
    near, built, result = run("custom_vqa", [path], deduplicate={"near": 6})
    assert near["dropped"] == {"duplicate": 1, "near_duplicate": 1}
    assert sorted((r["images"][0], r["messages"][0]["content"][8:]) for r in built) in (
        [("1.png", "What?"), ("2.png", "Other?"), ("3.png", "What?")],
        [("2.png", "Other?"), ("2.png", "What?"), ("3.png", "What?")],
    )
    assert [p for p in (result.out / "report.html").read_text().split() if p == "bits;"]
    none, _, _ = run("custom_vqa", [path], deduplicate=False)
    assert none["dropped"] == {}


def test_copies_of_a_file_are_the_same_picture(root, picture, run, write_json):
    for name in ("train2017/000000000009.jpg", "train2014/COCO_train2014_000000000009.jpg"):
        picture(root / name, 1)
    picture(root / "other.jpg", 2)

    def row(image, question="What?"):
        return {"image": image, "question": question, "answer": "A thing."}

    one, two = "train2017/000000000009.jpg", "train2014/COCO_train2014_000000000009.jpg"
    path = write_json("q.json", [row(one), row(two), row(two, "Other?"), row("other.jpg")])
    report, built, _ = run("custom_vqa", [path])
    assert report["dropped"] == {"duplicate": 1} and len(built) == 3
    assert {r["messages"][0]["content"] for r in built if r["images"] == [two]} >= {
        "<image>\nOther?"
    }
    report, built, _ = run("custom_vqa", [path], deduplicate=False)
    assert report["dropped"] == {} and len(built) == 4


@pytest.mark.parametrize("how", ["path", "bytes", "near"])
def test_which_copy_stays_is_told_by_its_id_and_not_by_its_place(
    how, root, picture, run, write_json
):
    """The smallest key, hash(seed, id), whatever the order of files and of records in them."""
    smooth = Image.radial_gradient("L").crop((20, 60, 220, 220))
    for number in range(8):
        smooth.resize((200 + number * (how == "near"), 160)).save(root / f"{number}.png")
    rows = [
        {"image": f"{0 if how == 'path' else n}.png", "question": "What?", "answer": "A thing."}
        for n in range(8)
    ]
    path = write_json("q.json", rows)
    near = {"near": 6, "text": False} if how == "near" else True
    stayed = set()
    for seed in range(6):
        _, every, _ = run("custom_vqa", [path], deduplicate=False, seed=seed)
        _, built, _ = run("custom_vqa", [path], deduplicate=near, seed=seed)
        keyed = min(
            every,
            key=lambda r: blake2b(r["id"].encode(), digest_size=8, key=str(seed).encode()).digest(),
        )
        assert [r["id"] for r in built] == [keyed["id"]]
        stayed.add(built[0]["meta"]["orig_index"])
    assert len(stayed) > 1


def test_held_out_pictures(root, picture, run, write_json, tmp_path):
    names = ["COCO_val2014_000000000042.jpg", "500.jpg", "100000000042.jpg", "x.jpg"]
    for number, name in enumerate(names):
        picture(root / name, number * 3, size=(120, 100))
    rows = [{"image": name, "question": "q", "answer": "a"} for name in names]
    questions = write_json("q.json", rows)
    coco = write_json("mscoco_val.json", {"questions": [{"image_id": 42, "question_id": 420}]})
    genome = tmp_path / "lrv_eval.txt"
    genome.write_text("500\n")
    folder = tmp_path / "held"
    picture(folder / "renamed.jpg", 9, size=(120, 100))
    against = [str(coco), str(genome), str(folder)]
    report, built, result = run(
        "custom_vqa", [questions], decontaminate={"against": against, "mode": "drop"}
    )
    assert report["dropped"] == {"held_out_picture": 3}
    assert [r["images"] for r in built] == [["100000000042.jpg"]]
    assert [o["records"] for o in result.manifest["held_out"].values()] == [1, 1, 1]
    report, built, _ = run(
        "custom_vqa", [questions], decontaminate={"against": against, "mode": "report"}
    )
    assert len(built) == 4 and report["dropped"] == {}
    # a damaged picture of the held-out set hides nothing silently
    (folder / "cut.jpg").write_bytes((folder / "renamed.jpg").read_bytes()[:300])
    _, _, result = run("custom_vqa", [questions], decontaminate={"against": [str(folder)]})
    assert result.manifest["held_out"][str(folder)] == {
        "pictures": 1, "records": 1, "unreadable": 1, "mode": "drop"}  # fmt: skip
    assert "1 of its pictures cannot be read" in (result.out / "report.html").read_text()
    (folder / "renamed.jpg").unlink()
    with pytest.raises(DataError, match=r"none of the 1 pictures in .* can be read"):
        run("custom_vqa", [questions], decontaminate={"against": [str(folder)]})


@pytest.mark.parametrize("key", ["cocoid", "coco_id"])
def test_the_key_says_that_an_id_is_cocos(key, root, picture, run, write_json):
    picture(root / "COCO_val2014_000000000042.jpg", 1)
    picture(root / "7.jpg", 2)
    rows = [{"image": name, "question": "q", "answer": "a"}
            for name in ("COCO_val2014_000000000042.jpg", "7.jpg")]  # fmt: skip
    held = write_json("held.json", [{key: 42, "image_id": 7}, {key: None, "image_id": 8}])
    report, _, _ = run(
        "custom_vqa",
        [write_json("q.json", [*rows, rows[0] | {"image": "7.jpg", "question": "r"}])],
        decontaminate={"against": [str(held)], "mode": "report"},
    )
    assert report["kept"] == 3
    held = write_json("held.json", [{key: 42}])
    report, built, _ = run(
        "custom_vqa", [write_json("q.json", rows)], decontaminate={"against": [str(held)]}
    )
    assert report["dropped"] == {"held_out_picture": 1} and built[0]["images"] == ["7.jpg"]


@pytest.mark.parametrize(
    "overrides, complaint",
    [
        (["decontaminate.against=[nothing.txt]"], r"nothing\.txt does not exist"),
        (["decontaminate.visual_genome=nothing.json"], r"nothing\.json: no such"),
        (["tokenizer=nothing.json"], r"nothing\.json: no such file"),
    ],
)
def test_what_is_needed_last_is_looked_at_first(overrides, complaint, recipe, monkeypatch):
    def too_late(*_args, **_keys):
        raise AssertionError("records are read already")

    monkeypatch.setattr(pipeline, "process_sources", too_late)
    with pytest.raises(DataError, match=complaint):
        build(recipe, overrides)


def test_visual_genome_pictures_that_are_coco_pictures(root, picture, run, write_json):
    """LRV's pictures carry Visual Genome ids; half of that collection are COCO pictures."""
    names = ("2300001", "2300002", "500")
    for name in names:
        picture(root / f"{name}.jpg", 1)
    rows = [{"image_id": name, "question": "q?", "answer": f"a {name}."} for name in names]
    annotations = write_json("lrv.json", rows)
    facts = [{"image_id": 2300001, "coco_id": 42}, {"image_id": 2300002, "coco_id": None}]
    rules = {
        "against": [str(write_json("mscoco_val.json", [{"image_id": 42}, {"image_id": 500}]))],
        "visual_genome": str(write_json("image_data.json", facts)),
    }
    report, records, _ = run("lrv_instruction", [annotations], decontaminate=rules)
    assert report["dropped"] == {"held_out_picture": 1}
    # the list is COCO's, so its 500 is another picture than Visual Genome's
    assert sorted(r["images"][0] for r in records) == ["2300002.jpg", "500.jpg"]
    rules["visual_genome"] = str(write_json("wrong.json", [{"image_id": 1}]))
    with pytest.raises(DataError, match=r"expected Visual Genome's image_data\.json"):
        run("lrv_instruction", [annotations], decontaminate=rules)


def test_a_failing_build_leaves_the_earlier_one_untouched(recipe, corpus, tmp_path, monkeypatch):
    out = build(recipe).out
    before = digest(out)
    path = tmp_path / "lrv2.json"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="truncated"):
        build(recipe)
    assert digest(out) == before
    assert not (tmp_path / ".build.building").exists()

    def full(*_args, **_keys):
        raise OSError(28, "No space left on device")

    path.write_text("[]")
    monkeypatch.setattr(pipeline, "make_manifest", full)
    with pytest.raises(DataError, match="the disk is full"):
        build(recipe)
    assert digest(out) == before
    assert (tmp_path / ".build.building").is_dir()  # what was done is kept
    monkeypatch.undo()
    assert build(recipe).kept_shards > 0
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_foreign_folder_is_never_replaced(recipe, tmp_path):
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="exists and is not a build folder"):
        build(recipe)
    for foreign in ('{"name": "my web app"}', '{"schema": 1}', "[1]", "not json"):
        (tmp_path / "build" / "manifest.json").write_text(foreign)
        with pytest.raises(DataError, match="exists and is not a build folder"):
            build(recipe)
    assert (tmp_path / "build" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    "overrides, complaint",
    [
        (["sed=4"], "override 'sed=4': unknown key 'sed'; did you mean 'seed'"),
        (["sources.0.anotations=x"], "unknown key 'anotations'; did you mean 'annotations'"),
        (["images.chek=false"], "unknown key 'images.chek'; did you mean 'images.check'"),
        (["sources.0.source=llava_instuct"], "did you mean 'llava_instruct'"),
        (["seed=many"], r"seed is 'many' \(a string\); expected integer"),
        (["seed=many", "sources.0.max=0"], r"(?s)sources\.0\.max is 0 .*seed is 'many'"),  # both
        (["sources.nothing.max=3"], "'nothing' is not one of the list's items 0 to 1, llava_inst"),
        (["sources.1.name=llava_instruct"], "two sources are called 'llava_instruct'"),
        (["seed"], "not of the form key.sub=value"),
        (["sources.0.annotations.0.x=1"], r"annotations\.0 is '.* \(a string\), not a section"),
        (["sources.0.clean=false"], "unknown key 'clean'"),
        (["sources.0.style=text"], "style is 'text' .* expected 'chat', 'vqa' or 'base'"),
        (["images.check=false", "deduplicate.near=3"], "needs images.check: true"),
        (["images.max_pixels=200000000"], "expected less than or equal to 178956970"),
        (
            ["commercial=true", "sources.1.source=llavar"],
            r"commercial: true, and the licences of llavar \(CC-BY-NC-4.0\) forbid it",
        ),
    ],
)
def test_recipe_mistakes(overrides, complaint, recipe, tmp_path):
    with pytest.raises(RecipeError, match=complaint):
        build(recipe, overrides)
    assert not (tmp_path / "build").exists()


def test_recipes_of_builds_and_of_runs_are_told_apart(tmp_path, capsys):
    from cogvlm_sft.cli import main

    same = [load_recipe(name) for name in ("chat_500k", "data/chat_500k", "chat_500k.yaml")]
    assert same[0] == same[1] == same[2]
    assert load_recipe("demo/data").sources  # a packaged build outside of that folder
    with pytest.raises(RecipeError, match="training run; `cogvlm-sft train chat` starts it"):
        load_recipe("chat")
    with pytest.raises(RecipeError, match="`cogvlm-sft data build data/vqa` makes it"):
        cogvlm_sft.load_recipe("data/vqa")
    assert main(["recipe", "check", "data/chat_500k", "sources.llavar.max=5"]) == 0
    assert main(["recipe", "check", "data/chat_500k", "sources.llavar.mx=5"]) == 2
    assert "unknown key 'mx'; did you mean 'max'" in capsys.readouterr().err
    path = tmp_path / "twice.yaml"
    path.write_text("out: a\nseed: 1\nseed: 2\nsources: [{source: okvqa}]\n")
    with pytest.raises(RecipeError, match="key 'seed' stands twice"):
        load_recipe(path)


def test_data_mistakes(recipe, tmp_path, root):
    with pytest.raises(DataError, match=r"annotation file .*gone\.json is missing"):
        build(recipe, [f"sources.0.annotations=[{tmp_path}/gone.json]"])
    with pytest.raises(DataError, match=r"image folder .*nowhere is missing"):
        build(recipe, [f"sources.0.images=[{root}/nowhere]"])
    with pytest.raises(DataError, match="lies outside of the image root"):
        build(recipe, [f"sources.0.images=[{tmp_path}]"])
    with pytest.raises(DataError, match=r"no conversation is left of 500 .*image_missing"):
        build(recipe, [f"sources.0.images=[{root}/vg]", f"sources.1.images=[{root}/coco]"])
    with pytest.raises(RecipeError, match=r"no recipe .*did you mean 'chat_500k'"):
        build("chat_600k")


def test_a_linked_destination_stays_a_link(recipe, tmp_path):
    """Builds are large, and `out` may point at another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "build")
    for _ in range(2):  # nothing there yet, then an earlier build
        build(recipe, [f"out={tmp_path}/link"])
        assert (tmp_path / "link").is_symlink()
        assert [p.name for p in (tmp_path / "disk").iterdir()] == ["build"]
        assert (tmp_path / "disk" / "build" / "manifest.json").is_file()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_mistakes_of_folders(recipe, tmp_path, root, monkeypatch):
    with pytest.raises(DataError, match=r"annotation file .*pictures is a folder, name the files"):
        build(recipe, [f"sources.0.annotations=[{root}]"])
    nothing = parse_recipe({"out": tmp_path / "b", "sources": [{"source": "custom_vqa"}]}, "")
    with pytest.raises(RecipeError, match="neither annotations nor images given"):
        build_recipe(nothing)

    with pytest.raises(DataError, match=r"File name too long; cannot build"):
        build(recipe, [f"out={tmp_path}/{'x' * 300}"])

    def read_only(*_args, **_keys):
        raise OSError(errno.EROFS, "Read-only file system", "/mnt/build")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(DataError, match=r"/mnt/build: Read-only file system; cannot build"):
        build(recipe)


def test_unchecked_build_needs_no_pictures(recipe, root):
    result = build(recipe, ["images=false", f"sources.0.images=[{root}/gone]"])
    assert result.manifest["totals"]["kept"] == 500
    one = next(c for c in read_conversations(result.out) if c.source == "llava_instruct")
    assert one.images[0].startswith("gone/0000")


def test_packaged_recipes_load():
    from data_builders.recipe import load_recipe, source_names

    used = set()
    for path in sorted((ROOT / "recipes" / "data").glob("*.yaml")):
        used |= {entry.source for entry in load_recipe(path.stem).sources}
    assert used == set(source_names())  # every source stands in a recipe that can be copied


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "data").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_command_a_recipe_prints_finds_its_pictures(path):
    """Run beside the folder that the recipe names, all picture folders lie below the image root."""
    text = re.sub(r"\\\n#\s*", "", path.read_text())
    (command,) = re.findall(r"^#   cogvlm-sft data build (.+)$", text, re.MULTILINE)
    name, *overrides = shlex.split(command)
    assert name == path.stem
    loaded = load_recipe(name, overrides)
    assert loaded.image_root is not None
    for entry in loaded.sources:
        assert entry.images and all(p.is_relative_to(loaded.image_root) for p in entry.images)


def test_list_sources_tells_what_to_fetch(tmp_path):
    (tmp_path / "filter_cap1.json").write_text("[]")
    (tmp_path / "okvqa").mkdir()
    (tmp_path / "okvqa" / "mscoco_train2014_annotations.json").write_text("[]")
    pictures = tmp_path / "somewhere" / "coco" / "train2014"
    pictures.mkdir(parents=True)
    (pictures / "COCO_train2014_000000000009.jpg").write_bytes(b"x")
    table = list_sources(tmp_path)
    assert "here     filter_cap1.json" in table
    assert "here     okvqa/mscoco_train2014_annotations.json" in table
    assert "missing  tdiuc/Annotations/mscoco_train2014_annotations.json" in table
    assert re.search(r"here     coco/train2014/ +1 pictures  train2014\.zip, ~13\.5 GB", table)
    assert "missing  coco/val2014/" in table
    assert re.search(r"missing  llava_v1_5_mix665k\.json +~1\.03 GB  665,298", table)
    assert " 268 MB  LLaVA and" in table and " 303 bytes  21 captions" in table  # to the byte
    assert re.search(r"refcoco/refs\(unc\)\.p +size not published  142,209", table)
    assert not re.search(r" - ", table)
    assert "CC-BY-NC-4.0 (non-commercial)" in table
    chosen = list_sources(tmp_path, ["okvqa"])
    assert chosen.startswith("okvqa:") and chosen in table
    with pytest.raises(RecipeError, match=r"unknown source 'okvq'; did you mean 'okvqa'\?"):
        list_sources(tmp_path, ["okvq"])
