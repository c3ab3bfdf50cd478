"""Small pictures inside a page, as data URIs."""

import base64
import io
import warnings
from pathlib import Path

from PIL import Image

from data_builders.image_check import upright_rgb

SIDE = 420
_LARGEST = 89_000_000


def thumbnail(path: Path) -> str:
    """A JPEG of at most 420 pixels a side as a data URI; empty where there is none to show.

    Args:
        path: Any picture file.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            if image.width * image.height > _LARGEST:
                return ""
            image.draft("RGB", (SIDE, SIDE))  # JPEG only: decodes at a fraction of the size
            small = upright_rgb(image, "white")
    except Exception:
        return ""  # missing, or broken in any of the ways Pillow reports: the page goes without
    small.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
