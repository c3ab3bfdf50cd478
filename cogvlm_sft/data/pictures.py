"""Reading picture files, and telling a damaged one before training starts.

Decoding half a million pictures before the first step would take an hour, so the check before
training reads what shows a cut-off file: a JPEG's header and end marker, a PNG's checksums. Small
files and other formats are decoded. A picture damaged in the middle is still found when its turn
comes, with the same message.
"""

from pathlib import Path

from PIL import Image

from cogvlm_sft.errors import DataError
from cogvlm_sft.model.image_processing_cogvlm import to_rgb

_SMALL = 64 * 1024
_TAIL = 4 * 1024
_JPEG_END = b"\xff\xd9"


def read_picture(path: Path, where: str, side: int | None = None) -> Image.Image:
    """Decodes a picture fully, upright and in RGB.

    Args:
        path: The file.
        where: Conversation and line, for the message.
        side: With it, a JPEG is decoded at 1/2, 1/4 or 1/8 of its scale where at least twice this
            many pixels remain along both sides. The decoder's own reduction differs from the
            resize that follows by more than its rounding (about one grey level on average), so
            training takes it only if asked to.

    Raises:
        DataError: The file is not a picture, or is damaged or cut off.
    """
    try:
        with Image.open(path) as image:
            if side is not None:
                image.draft(None, (2 * side, 2 * side))
            image.load()
            return to_rgb(image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise _damaged(path, where, error) from None


def check_picture(path: Path, where: str) -> None:
    """Finds a file that is no picture or was cut off, without decoding large JPEG and PNG files.

    Raises:
        DataError: As `read_picture`.
    """
    try:
        size = path.stat().st_size
        if size > _SMALL:
            with Image.open(path) as image:
                if image.format == "PNG":
                    image.verify()
                    return
                is_jpeg = image.format in ("JPEG", "MPO")
            if is_jpeg:
                with path.open("rb") as stream:
                    stream.seek(size - _TAIL)
                    if _JPEG_END in stream.read():
                        return
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise _damaged(path, where, error) from None
    read_picture(path, where)


def _damaged(path: Path, where: str, error: Exception) -> DataError:
    return DataError(
        f"{where}: image {path} cannot be decoded ({error}); "
        "replace the file, or remove the conversation"
    )
