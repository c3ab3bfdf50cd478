"""Small pictures inside a page, as data URIs, with the boxes that are spoken of."""

import base64
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from data_builders.image_check import upright_rgb

SIDE = 420
_LARGEST = 89_000_000
_BOX = re.compile(r"(?<=[\[;])(\d{3}),(\d{3}),(\d{3}),(\d{3})(?=[\];])")
_COLOURS = ("#ff5c39", "#2ec4ff", "#ffd23f", "#5dd65d", "#ff7bd5")

Box = tuple[int, int, int, int]


def boxes_in(texts: Sequence[str]) -> list[Box]:
    """The boxes `[[x0,y0,x1,y1;…]]` that texts speak of, in thousandths, each once."""
    found = (match for text in texts for match in _BOX.findall(text))
    return list(dict.fromkeys((int(a), int(b), int(c), int(d)) for a, b, c, d in found))


def thumbnail(path: Path, boxes: Sequence[Box] = ()) -> str:
    """A JPEG of at most 420 pixels a side as a data URI; empty where there is none to show.

    Args:
        path: Any picture file.
        boxes: Drawn on it; thousandths of its sides.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if image.width * image.height > _LARGEST:
                return ""
            image.draft("RGB", (SIDE, SIDE))  # JPEG only: decodes at a fraction of the size
            small = upright_rgb(image, "white")
    except Exception:
        return ""  # missing, or broken in any of the ways Pillow reports: the page goes without
    small.thumbnail((SIDE, SIDE))
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        left, top = x0 * small.width // 1000, y0 * small.height // 1000
        right, bottom = x1 * small.width // 1000, y1 * small.height // 1000
        corners = (left, top, max(left, right), max(top, bottom))
        ImageDraw.Draw(small).rectangle(corners, outline=_COLOURS[number % len(_COLOURS)], width=3)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
