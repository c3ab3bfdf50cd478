"""What a person may hand in, and the one message that says why something is refused.

Whoever talks to a model through the page or the server may be anyone, so everything is measured
before it is worked on: a file by its bytes and by the size that its header names (a picture of
30,000 x 30,000 pixels is 2.7 GB once decoded), a text by its length. The markers of CogVLM's own
prompts are refused in a question: "<image>" would ask for a picture that is not there, and the
released code deletes "<EOI>" silently.
"""

import base64
import binascii
import io
import re
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from cogvlm_sft.errors import DataError
from cogvlm_sft.model.image_processing_cogvlm import to_rgb

MAX_FILE_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
MAX_CHARACTERS = 8_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO")

_MARKERS = re.compile(r"<image>|<EOI>", re.IGNORECASE)
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


def check_question(text: str) -> str:
    """A question, its ends stripped.

    Raises:
        DataError: It is empty, too long, or holds a marker of the prompts.
    """
    question = text.strip()
    if not question:
        raise DataError("the question is empty; expected some text")
    if len(question) > MAX_CHARACTERS:
        raise DataError(
            f"the question has {len(question):,} characters, expected at most {MAX_CHARACTERS:,}; "
            "shorten it"
        )
    refuse_markers(question, "the question")
    return question


def refuse_markers(text: str, name: str) -> None:
    """Looks for the markers of the prompts in what a person wrote.

    Args:
        text: Any text of a conversation.
        name: What to call it in a message.

    Raises:
        DataError: There is one.
    """
    if marker := _MARKERS.search(text):
        raise DataError(
            f"{name} holds {marker.group()}, which marks a picture in CogVLM's own prompts; "
            "leave it out (the picture is given apart) or write it otherwise"
        )


def read_upload(source: Path | bytes, name: str = "") -> Image.Image:
    """A picture that a person handed in, upright and in RGB.

    Args:
        source: A file, or its content.
        name: What to call it in a message; a file is called by its own name.

    Raises:
        DataError: It is missing, too large as a file or as a picture, no picture, of a format that
            is not read here, or damaged.
    """
    if isinstance(source, Path):
        name = name or source.name
        if not source.is_file():
            found = "is a folder" if source.is_dir() else "does not exist"
            raise DataError(
                f"image {source} {found}; give the path of a picture file "
                f"(the working directory is {Path.cwd()})"
            )
        size = source.stat().st_size
    else:
        size = len(source)
    if size > MAX_FILE_BYTES:
        raise DataError(
            f"{name} has {size / 2**20:.1f} MB, expected at most {MAX_FILE_BYTES // 2**20} MB; "
            "save it smaller"
        )
    try:
        with warnings.catch_warnings():
            # Pillow warns of a large picture on opening; the limit below is lower.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(source if isinstance(source, Path) else io.BytesIO(source))
        with opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise _too_large(name, f"{width:,} x {height:,}")
            if opened.format not in FORMATS:
                raise DataError(
                    f"{name} is a picture of format {opened.format}, expected one of "
                    f"{', '.join(FORMATS)}; convert it"
                )
            opened.load()
            return to_rgb(opened)
    except Image.DecompressionBombError:
        raise _too_large(name, "too many") from None
    except UnidentifiedImageError:
        raise DataError(
            f"{name} is not a picture, whatever its name says; expected one of {', '.join(FORMATS)}"
        ) from None
    except DataError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on a damaged file
        raise DataError(
            f"{name} is damaged and cannot be decoded ({error}); send it again"
        ) from None


def read_data_url(url: str) -> Image.Image:
    """A picture from a `data:image/...;base64,` address.

    Raises:
        DataError: It is another kind of address, is not base64, or as `read_upload`.
    """
    match = _DATA_URL.match(url)
    if match is None:
        raise DataError(
            f"the picture is given as {url[:60]!r}; expected its bytes as data:image/png;base64,… "
            "(this server opens no files and no addresses for a client)"
        )
    if len(url) > MAX_FILE_BYTES * 4 // 3 + 100:
        raise DataError(f"the picture has more than {MAX_FILE_BYTES // 2**20} MB; save it smaller")
    try:
        content = base64.b64decode(url[match.end() :], validate=True)
    except binascii.Error as error:
        raise DataError(f"the picture is not base64 ({error})") from None
    return read_upload(content, "the picture")


def _too_large(name: str, pixels: str) -> DataError:
    return DataError(
        f"{name} has {pixels} pixels, expected at most {MAX_PIXELS // 10**6} million; scale it "
        "down (the model sees a few hundred a side)"
    )
