"""Boxes as CogVLM writes them: `[[x0,y0,x1,y1]]` in thousandths of the picture, 000 to 999.

The rule is int(coordinate / side * 1000), floored and clipped, three digits; several boxes of one
phrase stand in one bracket, `[[a;b]]` (THUDM/CogVLM issue 25). The picture is squeezed to a square
without keeping its shape, so thousandths of each side stay true. Data sets give corners or (x, y,
width, height) in pixels; a box that is no box is a reason to drop, never a guess.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_builders.image_check import ImageLimits, check_image
from data_builders.images import ImageFinder

Corners = tuple[float, float, float, float]


def corners(box: Any, sized: bool = False) -> Corners | str:
    """Four numbers as (x0, y0, x1, y1), or the reason why they are no box.

    Args:
        box: A list of four numbers, in pixels.
        sized: Whether the last two are width and height, as in COCO's annotations.
    """
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_number, box)):
        return "box_not_four_numbers"
    x0, y0, x1, y1 = (float(value) for value in box)
    if sized:
        x1, y1 = x0 + x1, y0 + y1
    if x1 <= x0 or y1 <= y0:
        return "box_empty"
    return x0, y0, x1, y1


def box_text(boxes: Sequence[Corners], width: float, height: float) -> str:
    """Boxes of one phrase as text, or the reason why they cannot be written.

    Args:
        boxes: Corners in pixels.
        width, height: The picture's sides in pixels, after its EXIF rotation.

    Returns:
        `[[…]]`, or a reason, which never begins with a bracket.
    """
    written = []
    for x0, y0, x1, y1 in boxes:
        if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
            return "box_outside_picture"
        written.append(thousandths((x0, y0, x1, y1), width, height))
    return f"[[{';'.join(written)}]]"


def thousandths(box: Corners, width: float, height: float) -> str:
    """`x0,y0,x1,y1` of a box in pixels, clipped to the picture; the one place of the rule."""
    x0, y0, x1, y1 = box
    scaled = (x0 / width, y0 / height, x1 / width, y1 / height)
    return ",".join(f"{min(max(int(v * 1000), 0), 999):03d}" for v in scaled)


def picture_size(width: Any, height: Any) -> tuple[float, float] | None:
    """The sides that an annotation gives; None where they are no sides."""
    if _number(width) and _number(height) and width > 0 and height > 0:
        return float(width), float(height)
    return None


def look_up_size(finder: ImageFinder, name: Any) -> tuple[tuple[float, float] | None, str]:
    """The sides of a picture whose annotation gives none, read from the file.

    Returns:
        The sides, or None with the reason.
    """
    if not isinstance(name, str) or not name:
        return None, "image_name_missing"
    path, reason = finder.find(name)
    if path is None:
        return None, reason
    file = Path(finder.root, path)
    try:
        # the header alone; decoding is judged later, once
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) in (5, 6, 7, 8):
                width, height = height, width
            return (float(width), float(height)), ""
    except Exception:  # Pillow's plugins raise whatever a broken file provokes
        if not finder.must_exist:
            return None, "image_size_unknown"
        return None, check_image(file, ImageLimits()).reason or "image_broken"


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # False for NaN too
