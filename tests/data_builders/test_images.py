"""Which file a name means, and what a picture must be."""

import pytest
from PIL import Image

from data_builders.image_check import ImageLimits, check_image
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


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16", "1", "F"])
def test_every_mode_is_usable(mode, tmp_path):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.tif" if mode == "F" else "a.png")
    Image.new(mode, (40, 50)).save(path)
    facts = check_image(path, ImageLimits(), hashed=True)
    assert facts.reason is None and (facts.width, facts.height) == (40, 50)
    assert facts.phash is not None


def test_size_after_rotation_and_limits(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 60)).save(tmp_path / "turned.jpg", exif=exif)
    assert check_image(tmp_path / "turned.jpg", ImageLimits()).width == 60
    Image.new("RGB", (30, 6001)).save(tmp_path / "long.png")
    Image.new("RGB", (27, 300)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("hello")
    names = ["turned.jpg", "long.png", "small.png", "text.png", "gone.png"]
    facts = check_images(tmp_path, names, ImageLimits(), hashed=False, workers=2)
    assert [fact.reason for fact in facts] == [
        None, "image_too_long", "image_too_small", "image_not_an_image", "image_missing",
    ]  # fmt: skip
