"""Hostile uploads and questions: one clear message each, and nothing large is ever decoded."""

import base64
import struct
import zlib
from pathlib import Path

import psutil
import pytest
from PIL import Image

from cogvlm_sft.chat.limits import MAX_FILE_BYTES, check_question, read_data_url, read_upload
from cogvlm_sft.errors import DataError


def huge_png(path: Path, side: int = 30_000) -> Path:
    """A sound PNG of side x side grey pixels; 4 MB on the disk."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    packer = zlib.compressobj(1)
    rows = bytes((side + 1) * 100)
    pixels = b"".join(packer.compress(rows) for _ in range(side // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def test_a_huge_picture_is_refused_by_its_header(tmp_path: Path) -> None:
    path = huge_png(tmp_path / "huge.png")
    before = psutil.Process().memory_info().rss
    with pytest.raises(DataError, match=r"huge\.png has .* pixels, expected at most 50 million"):
        read_upload(path)
    assert psutil.Process().memory_info().rss - before < 50 * 2**20  # decoded it has 900 MB
    with pytest.raises(DataError, match="8,000 x 8,000 pixels"):
        read_upload(huge_png(tmp_path / "large.png", 8_000))


def test_what_is_no_picture_is_said_so(tmp_path: Path) -> None:
    text = tmp_path / "cat.png"
    text.write_text("I am a cat")
    with pytest.raises(DataError, match=r"cat\.png is not a picture, whatever its name says"):
        read_upload(text)
    large = tmp_path / "large.png"
    large.write_bytes(b"\0" * (MAX_FILE_BYTES + 1))
    with pytest.raises(DataError, match=r"20\.0 MB, expected at most 20 MB"):
        read_upload(large)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.ppm")
    with pytest.raises(DataError, match="format PPM, expected one of JPEG"):
        read_upload(tmp_path / "a.ppm")
    Image.new("RGB", (90, 90), "red").save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:500])
    with pytest.raises(DataError, match=r"cut\.jpg is damaged"):
        read_upload(tmp_path / "cut.jpg")


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("a" * 2**20, "1,048,576 characters, expected at most 8,000"),
        ("what <image> is", "holds <image>"),
        ("<Image>", "holds <Image>"),
        ("<EOI> and", "holds <EOI>"),
    ],
)
def test_questions_that_are_refused(question: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_question(question)


def test_a_question_keeps_its_words() -> None:
    assert check_question("  is 1 < 2 </s>? ") == "is 1 < 2 </s>?"


def test_pictures_in_data_addresses(picture: Path) -> None:
    content = base64.b64encode(picture.read_bytes()).decode()
    assert read_data_url(f"data:image/png;base64,{content}").size == (40, 30)
    for url in ("http://localhost/a.png", "/etc/passwd", "file:///etc/passwd", ""):
        with pytest.raises(DataError, match="expected its bytes"):
            read_data_url(url)
    with pytest.raises(DataError, match="not base64"):
        read_data_url("data:image/png;base64,@@@")
