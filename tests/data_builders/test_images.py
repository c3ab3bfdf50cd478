"""Which file a name means, and what a picture must be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_builders import picture_shards
from data_builders.image_check import ImageLimits, check_image, upright_rgb
from data_builders.images import ImageFinder, unsafe
from data_builders.picture_shards import check_images


@pytest.fixture
def files(root, picture):
    for number, name in enumerate([
        "coco/train2014/COCO_train2014_000000000009.jpg", "coco/train2017/000000000009.jpg",
        "vg/VG_100K/5.jpg", "vg/VG_100K_2/6.jpg", "a/images/1.jpg", "b/images/1.jpg",
        "b/images/2.jpg", "c/UPPER.PNG", "__MACOSX/c/7.jpg", "c/._7.jpg",
    ]):  # fmt: skip
        picture(root / name, number)
    return root


@pytest.mark.parametrize(
    "name, found",
    [
        ("coco/train2017/000000000009.jpg", "coco/train2017/000000000009.jpg"),
        ("000000000009.jpg", "coco/train2017/000000000009.jpg"),
        ("COCO_val2014_000000000009.jpg", "coco/train2014/COCO_train2014_000000000009.jpg"),
        ("vg/VG_100K_2/5.jpg", "vg/VG_100K/5.jpg"),
        ("6.jpg", "vg/VG_100K_2/6.jpg"),
        ("a/images/1.jpg", "a/images/1.jpg"),
        ("b/images/1.png", "b/images/1.jpg"),
        ("data/set/b/images/2.jpg", "b/images/2.jpg"),
        ("./c//upper.jpg", "c/UPPER.PNG"),
        ("c\\UPPER.PNG", "c/UPPER.PNG"),
        ("1.jpg", "image_ambiguous"),
        ("a/images/2.jpg", "image_missing"),
        ("x/5.jpg", "image_missing"),
        ("7.jpg", "image_missing"),
        ("../a/images/1.jpg", "image_path_unsafe"),
        ("/etc/passwd", "image_path_unsafe"),
        ("C:\\a.jpg", "image_path_unsafe"),
        ("http://x/a.jpg", "image_path_unsafe"),
        ("a\\..\\..\\b.jpg", "image_path_unsafe"),
        ("", "image_path_unsafe"),
    ],
)
def test_what_a_name_means(files, name, found):
    path, reason = ImageFinder(files, [files]).find(name)
    if name.startswith("COCO"):
        assert path is not None and path.endswith("000000000009.jpg")
    else:
        assert (path or reason) == found


def test_names_as_other_systems_write_them(tmp_path, picture):
    """macOS unpacks accents in two parts; a table may hold blanks; a parent folder may be named."""
    picture(tmp_path / "set" / "images" / "cafe\u0301.jpg", 1)
    picture(tmp_path / "set" / "train" / "7.jpg", 2)
    picture(tmp_path / "set" / "val" / "7.jpg", 3)
    finder = ImageFinder(tmp_path, [tmp_path])
    for name in ("images/caf\u00e9.jpg", " set/images/cafe\u0301.png ", "caf\u00e9.jpg"):
        assert finder.find(name) == ("set/images/cafe\u0301.jpg", "")
    assert finder.find("train/7.jpg") == ("set/train/7.jpg", "")
    assert finder.find("7.jpg") == (None, "image_ambiguous")
    assert finder.find("test/7.jpg") == (None, "image_missing")
    assert finder.find(" ../7.jpg") == (None, "image_path_unsafe")


def test_two_folders_with_the_same_names(files):
    finder = ImageFinder(files, [files / "a" / "images", files / "b" / "images"])
    assert finder.find("b/images/1.jpg")[0] == "b/images/1.jpg"
    assert finder.find("set/b/images/1.jpg")[0] == "b/images/1.jpg"
    assert finder.find("set/a/images/2.jpg") == (None, "image_missing")
    assert finder.find("1.jpg") == (None, "image_ambiguous")


def test_dots_in_names_are_not_unsafe():
    assert not unsafe("a..b.jpg") and not unsafe("...jpg") and unsafe("a/..") and unsafe("~/a")


def test_links_inside_the_root_are_followed_once(files):
    (files / "link").symlink_to(files / "a")
    (files / "a" / "loop").symlink_to(files)
    finder = ImageFinder(files, [files])
    assert finder.find("link/images/1.jpg")[0] is not None


def photo(mode: str = "RGB", size: tuple[int, int] = (60, 40)) -> Image.Image:
    """A picture with structure, whatever its mode."""
    grey = Image.radial_gradient("L").resize(size)
    if mode.startswith("I;16"):
        return Image.fromarray(np.asarray(grey, dtype=np.uint16) * 256 + 7)
    if mode == "RGBA":
        return Image.merge("RGBA", (grey, grey.rotate(90), grey.rotate(180), grey))
    return grey.convert("RGB").convert(mode)


def save(path: Path, mode: str = "RGB", orientation: int = 1, **keys: Any) -> Path:
    exif = Image.Exif()
    if orientation > 1:
        exif[0x0112] = orientation
    photo(mode).save(path, exif=exif, **keys)
    return path


ODD = [
    ("grey.png", "L", {}, ()),
    ("plain.jpg", "RGB", {}, ()),
    ("cmyk.jpg", "CMYK", {}, ("cmyk",)),
    ("clear.png", "RGBA", {}, ("transparent",)),
    ("clear.webp", "RGBA", {"lossless": True}, ("transparent",)),
    ("clear_grey.png", "LA", {}, ("transparent",)),
    ("palette.png", "P", {}, ("palette",)),
    ("clear_palette.png", "P", {"transparency": 3}, ("transparent",)),
    ("deep.png", "I;16", {}, ("deep_grey",)),
    ("deep.tif", "I;16", {}, ("deep_grey",)),
    ("bits.png", "1", {}, ("other_mode",)),
    ("turned.jpg", "RGB", {"orientation": 6}, ("turned_by_exif",)),
    ("mirrored.png", "RGB", {"orientation": 2}, ("turned_by_exif",)),
    ("really.jpg", "P", {"format": "GIF"}, ("palette", "wrong_extension")),
    ("really.png", "RGB", {"format": "JPEG"}, ("wrong_extension",)),
]


@pytest.mark.parametrize("name, mode, keys, odd", ODD, ids=[case[0] for case in ODD])
def test_odd_pictures_are_usable_and_read_as_training_reads_them(name, mode, keys, odd, tmp_path):
    from cogvlm_sft.model.image_processing_cogvlm import to_rgb

    path = save(tmp_path / name, mode, **keys)
    facts = check_image(path, ImageLimits(), hashed=True)
    assert facts.reason is None and facts.oddities == odd and facts.phash is not None
    with Image.open(path) as image:
        ours, theirs = upright_rgb(image), to_rgb(image)
    assert ours.mode == "RGB" and ours.tobytes() == theirs.tobytes()
    assert (facts.width, facts.height) == ours.size
    assert ours.size == ((40, 60) if keys.get("orientation", 1) > 4 else (60, 40))
    assert np.asarray(ours).std() > 20  # not white, not black: the picture is there


def test_the_first_frame_of_an_animation_counts(tmp_path):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    facts = check_image(tmp_path / "a.gif", ImageLimits())
    assert facts.reason is None and "several_frames" in facts.oddities
    with Image.open(tmp_path / "a.gif") as image:
        assert upright_rgb(image).getpixel((5, 5)) == (255, 0, 0)


def test_a_background_for_transparent_parts(tmp_path):
    Image.new("RGBA", (30, 30), (0, 0, 0, 0)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert upright_rgb(image, "white").getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "bmp", "webp", "tif"])
@pytest.mark.parametrize("left", [0.02, 0.5, 0.97])
def test_truncated_files_are_refused(ending, left, tmp_path):
    """A header alone is never enough: the file is cut at many places."""
    path = tmp_path / f"a.{ending}"
    noise = np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    assert check_image(path, ImageLimits()).reason is None
    path.write_bytes(whole[: int(len(whole) * left)])
    assert check_image(path, ImageLimits()).reason in (
        "image_truncated", "image_broken", "image_not_an_image",
    )  # fmt: skip


JPEGS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("RGB", {}), "progressive": ("RGB", {"progressive": True}),
    "full colour": ("RGB", {"subsampling": 0}), "restarts": ("RGB", {"restart_marker_rows": 1}),
    "grey": ("L", {"optimize": True}),
}  # fmt: skip


@pytest.mark.parametrize("mode, keys", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_at_a_fraction_of_its_scale_is_refused_as_at_full_scale(mode, keys, tmp_path):
    """Cut at many places and overwritten at others, plain decoding and the check agree."""
    path = tmp_path / "a.jpg"
    photo(mode, (280, 200)).save(path, **keys)
    whole = path.read_bytes()
    facts = check_image(path, ImageLimits(), hashed=True)
    assert (facts.reason, facts.width, facts.height) == (None, 280, 200)
    generator = np.random.default_rng(0)
    broken = [whole[:end] for end in range(0, len(whole), 1 + len(whole) // 60)]
    for place in generator.integers(20, len(whole), 60).tolist():
        broken.append(whole[:place] + generator.bytes(2) + whole[place + 2 :])
    for content in broken:
        path.write_bytes(content)
        try:
            with Image.open(path) as image:
                size = image.size
                image.load()
            refused = min(size) < 28 or max(size) > 200 * min(size)
        except Exception:
            refused = True
        assert (check_image(path, ImageLimits()).reason is not None) == refused


def test_hashes_of_a_jpeg_and_its_lossless_copy_are_near(tmp_path):
    """The one is decoded at an eighth or a quarter of its scale, the other in full."""
    generator = np.random.default_rng(0)
    for number in range(8):
        coarse = Image.fromarray(generator.integers(0, 255, (9, 12, 3), dtype=np.uint8))
        whole = coarse.resize((640, 480), Image.Resampling.BICUBIC)
        whole.save(tmp_path / "a.jpg", quality=90)
        whole.save(tmp_path / "a.png")
        first, second = (
            check_image(tmp_path / name, ImageLimits(), hashed=True).phash
            for name in ("a.jpg", "a.png")
        )
        assert first is not None and second is not None
        assert (first ^ second).bit_count() <= 4, number


def test_what_is_refused(tmp_path):
    photo().resize((6001, 30)).save(tmp_path / "long.png")
    photo().resize((27, 300)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>404 Not Found</html>")
    (tmp_path / "folder.jpg").mkdir()
    Image.new("1", (30000, 30000)).save(tmp_path / "bomb.png")
    names = ["long.png", "small.png", "text.png", "empty.jpg", "page.jpg", "gone.png", "bomb.png",
             "folder.jpg"]  # fmt: skip
    facts = check_images(tmp_path, names, ImageLimits(), hashed=False, workers=2)
    assert [fact.reason for fact in facts] == [
        "image_too_long", "image_too_small", "image_not_an_image", "image_empty_file",
        "image_not_an_image", "image_missing", "image_too_large", "image_broken",
    ]  # fmt: skip


def test_processes_find_the_same(tmp_path, monkeypatch):
    names = [save(tmp_path / name, mode, **keys).name for name, mode, keys, _ in ODD]
    monkeypatch.setattr(picture_shards, "_SMALL", 0)
    monkeypatch.setattr(picture_shards, "_ITEM", 2)
    one = check_images(tmp_path, names, ImageLimits(), hashed=True, workers=1)
    assert check_images(tmp_path, names, ImageLimits(), hashed=True, workers=2) == one


def test_odd_kinds_are_counted(run, root, write_json):
    rows = []
    for name, mode, keys, _ in ODD:
        save(root / name, mode, **keys)
        rows.append({"image": name, "question": f"{name}?", "answer": "a"})
    report, _, result = run("custom_vqa", [write_json("q.json", rows)])
    assert report["kept"] == len(ODD)
    assert result.manifest["pictures"]["converted_when_read"] == {
        "cmyk": 1, "deep_grey": 2, "other_mode": 1, "palette": 2, "transparent": 4,
        "turned_by_exif": 2, "wrong_extension": 2,
    }  # fmt: skip
