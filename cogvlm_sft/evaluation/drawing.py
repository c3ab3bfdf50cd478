"""Boxes drawn on pictures, for the report, the chat and the page."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageOps

from cogvlm_sft.evaluation.metrics.boxes import Box, to_pixels

# Distinct for readers who do not tell red from green, on light and dark pictures.
PREDICTED, TRUE = "#e4572e", "#17bebb"


def for_screen(picture: Image.Image, longest_side: int) -> Image.Image:
    """A copy that a person can see: large ones scaled down, tiny ones up without smoothing.

    Args:
        picture: Any size; it is not changed.
        longest_side: At most this many pixels, and at least half as many.
    """
    longest = max(picture.size)
    if longest > longest_side:
        return ImageOps.contain(picture, (longest_side, longest_side))
    factor = max(1, longest_side // longest)
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def draw_boxes(picture: Image.Image, boxes: Sequence[tuple[Box, str, str]]) -> Image.Image:
    """A copy of a picture with boxes on it.

    Args:
        picture: Any size; it is not changed.
        boxes: (box in thousandths, colour, label) of each; an empty label writes none.
    """
    drawn = picture.convert("RGB")
    if drawn is picture:
        drawn = drawn.copy()
    canvas = ImageDraw.Draw(drawn)
    width, height = drawn.size
    line = max(2, round(min(width, height) / 100))
    for box, colour, label in boxes:
        x0, y0, x1, y1 = to_pixels(box, width, height)
        # An outline outside the picture would be cut off.
        right, bottom = min(width - 1, x1), min(height - 1, y1)
        canvas.rectangle(
            (x0, y0, max(x0 + 1, right), max(y0 + 1, bottom)), outline=colour, width=line
        )
        if label:
            size = max(10, round(min(width, height) / 28))
            left, top, right, bottom = canvas.textbbox(
                (x0 + line, y0 + line), label, font_size=size
            )
            canvas.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=colour)
            canvas.text((x0 + line, y0 + line), label, fill="white", font_size=size)
    return drawn
