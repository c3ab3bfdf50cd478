"""Boxes in answers: reading them, merging them, and the overlap of two.

Notable choices: several boxes in one answer are merged into the smallest box around them, and a hit
is an overlap strictly above one half, which is how the authors of CogVLM score RefCOCO
(THUDM/CogVLM issue 127; Qwen-VL and lmms-eval count one half itself as a hit); an answer that holds
no box counts as wrong and never as missing, so that the denominator is the number of questions.
"""

import re
from collections.abc import Sequence

from data_builders.boxes import thousandths

Box = tuple[float, float, float, float]

_GROUP = re.compile(r"\[\[(?P<boxes>[^\[\]]*)\]\]")
_BOX = re.compile(r"\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*")


def parse_boxes(text: str) -> list[Box]:
    """Boxes of an answer, in thousandths of the picture's width and height.

    CogVLM writes `[[x0,y0,x1,y1]]` and joins several boxes of one thing with semicolons:
    `[[a;b]]` (THUDM/CogVLM issue 25). A sentence may hold several such groups. A group with
    anything in it that is not a box of four numbers gives no box.

    Returns:
        (x0, y0, x1, y1) for each box, in the order of the text; corners are put in order.
    """
    boxes: list[Box] = []
    for group in _GROUP.finditer(text):
        found = [_BOX.fullmatch(part) for part in group["boxes"].split(";")]
        for match in found if all(found) else ():
            assert match is not None
            x0, y0, x1, y1 = (float(value) for value in match.groups())
            boxes.append((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)))
    return boxes


def merge_boxes(boxes: Sequence[Box]) -> Box | None:
    """The smallest box around all; None of none."""
    if not boxes:
        return None
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def intersection_over_union(one: Box, other: Box) -> float:
    """Shared area over joint area of two boxes, 0 to 1; 0 where both are empty.

    Args:
        one, other: x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, in the same units.
    """
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    joint = _area(one) + _area(other) - shared
    return shared / joint if joint > 0 else 0.0


def box_match(prediction: str, answer: str, threshold: float = 0.5) -> bool:
    """Whether the merged box of an answer overlaps the true one by more than `threshold`.

    Both texts are in thousandths of one picture, so on a picture that is not square the overlap
    equals the overlap in pixels: both axes are scaled alike in both boxes.

    Args:
        prediction: The model's answer.
        answer: The true answer; it must hold a box.
        threshold: Strict lower bound of the overlap.

    Raises:
        ValueError: The true answer holds no box.
    """
    truth = merge_boxes(parse_boxes(answer))
    if truth is None:
        raise ValueError(f"the true answer {answer!r} holds no box [[x0,y0,x1,y1]]")
    found = merge_boxes(parse_boxes(prediction))
    return found is not None and intersection_over_union(found, truth) > threshold


def write_box(box: Box, width: float, height: float) -> str:
    """A box in pixels as CogVLM writes it: three digits each, thousandths of the picture's sides.

    Args:
        box: x0, y0, x1, y1 in pixels.
        width, height: Of the picture, in pixels.
    """
    return f"[[{thousandths(box, width, height)}]]"


def to_pixels(box: Box, width: float, height: float) -> Box:
    """A box in thousandths as pixels of a picture; the authors divide by 1000."""
    x0, y0, x1, y1 = box
    return x0 / 1000 * width, y0 / 1000 * height, x1 / 1000 * width, y1 / 1000 * height


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
