"""Every source as a script: the command in its docstring parses, and tells what is missing."""

import json
import re
import shlex
import sys

import pytest
from PIL import Image

from data_builders.recipe import source_names
from data_builders.script import run_source
from data_builders.source import Source, load_source


def usage(name):
    """The arguments of each command in the module's docstring."""
    source = load_source(name)
    text = sys.modules[source.__module__].__doc__.replace("\\\n", " ")
    commands = re.findall(rf"python -m data_builders\.sources\.{name} ([^\n]+)", text)
    return [shlex.split(command) for command in commands]


@pytest.mark.parametrize("name", source_names())
def test_the_documented_command_runs_up_to_the_missing_files(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert usage(name)
    for arguments in usage(name):
        with pytest.raises(SystemExit) as stopped:
            run_source(name, arguments)
        said = capsys.readouterr().err
        assert stopped.value.code == 2
        assert re.fullmatch(r"error: [^\n]*(missing|no such|not a folder)[^\n]*\n", said), said
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", source_names())
def test_what_a_source_says_of_itself(name):
    source = load_source(name)
    assert source.name == name and source.title and source.license
    assert source.files and source.image_folders
    assert source.home or name == "custom_vqa"
    assert source.draft is not Source.draft
    for file in source.files:
        assert file.size >= 0 and not file.name.startswith("/")
        assert file.name in source.__doc__ and file.size_in_words() in source.__doc__
    for folder in source.image_folders:
        assert f"{folder.name}/" in source.__doc__
    assert source.license in source.__doc__


@pytest.mark.parametrize("name", source_names())
def test_help_tells_what_to_fetch_and_what_every_flag_means(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_source(name, ["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert load_source(name).what_to_fetch() in said
    flags = re.findall(r"^  (?:-h, )?(--[a-z-]+)(.*(?:\n {4,}.*)*)", said, re.MULTILINE)
    assert len(flags) > 12
    for flag, rest in flags:
        assert len(re.sub(r"[A-Z]{2,}[=A-Z]*|\{.*?\}|\[.*?\]|\.\.\.", "", rest).split()) > 1, flag


def test_flags_for_held_out_and_near_pictures(root, tmp_path, write_json):
    smooth = Image.radial_gradient("L").crop((20, 60, 220, 220))
    for number, size in enumerate([(200, 160), (180, 144), (200, 160)]):
        shown = smooth if number < 2 else smooth.rotate(90).point(lambda value: 255 - value)
        shown.resize(size).save(root / f"{number}.png")
    rows = [{"image": f"{n}.png", "question": "What?", "answer": "A thing."} for n in range(3)]
    held_out = tmp_path / "ids.txt"
    held_out.write_text("2\n")
    build = tmp_path / "build"
    run_source("custom_vqa", [
        "--annotations", str(write_json("q.json", rows)), "--images", str(root), "--near", "6",
        "--against", str(held_out), "--out", str(build), "--workers", "1",
    ])  # fmt: skip
    report = json.loads((build / "manifest.json").read_text())["sources"]["custom_vqa"]
    assert report["dropped"] == {"held_out_picture": 1, "near_duplicate": 1}
