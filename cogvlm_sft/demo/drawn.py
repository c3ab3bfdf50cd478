"""Drawn pictures of the demo: signs to read and coloured shapes to find.

Pictures are drawn with Pillow and its built-in font, so that nothing is downloaded and the truth is
exact. Notable choices: a sign holds three capitals or three digits, one a slot, in random colours
and with jitter, so that reading an unseen word means reading its letters; shapes stand on a grid of
eight cells, so that a small model can name their corners exactly; every draw comes from a
`random.Random` that the caller seeds, so that the same seed gives the same bytes.
"""

import math
import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

PICTURE_SIZE = 56
CELLS = 8
CELL = PICTURE_SIZE // CELLS
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
SHAPES = ("square", "circle", "triangle")
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 180),
    "orange": (250, 130, 20),
}
_PAPERS = ((250, 250, 245), (228, 236, 246), (246, 234, 222), (226, 242, 228), (60, 64, 72))
_INKS = ((20, 20, 20), (25, 45, 130), (130, 25, 30), (20, 90, 50))
_LIGHT_INKS = ((250, 250, 250), (255, 230, 120), (150, 230, 255))


@dataclass(frozen=True, slots=True)
class Shape:
    """A coloured shape on the grid.

    Attributes:
        color: Key of `COLORS`.
        kind: One of `SHAPES`.
        column, row: Upper left cell, 0 to 7.
        cells: Width and height in cells.
    """

    color: str
    kind: str
    column: int
    row: int
    cells: int

    @property
    def name(self) -> str:
        """`red square`"""
        return f"{self.color} {self.kind}"

    def pixels(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 in pixels; the right and lower edges are outside the shape."""
        x, y, side = self.column * CELL, self.row * CELL, self.cells * CELL
        return x, y, x + side, y + side

    def box(self) -> str:
        """CogVLM's text of the box."""
        return box_text(self.pixels(), (PICTURE_SIZE, PICTURE_SIZE))


def box_text(box: tuple[float, float, float, float], size: tuple[int, int]) -> str:
    """Writes a box the way CogVLM does: `[[x0,y0,x1,y1]]`, thousandths in three digits.

    Rule: floor of coordinate * 1000 / size, 000 to 999 (THUDM/CogVLM issue 25), so that the far
    edge of the picture is 999.

    Args:
        box: x0, y0, x1, y1 in pixels.
        size: Width and height in pixels.
    """
    limits = (size[0], size[1], size[0], size[1])
    values = [
        min(999, max(0, math.floor(value * 1000 / limit)))
        for value, limit in zip(box, limits, strict=True)
    ]
    return "[[" + ",".join(f"{value:03d}" for value in values) + "]]"


def draw_sign(text: str, rng: random.Random) -> Image.Image:
    """A sign with up to four characters, one a slot.

    Args:
        text: Capitals or digits.
        rng: Source of colours, sizes and jitter.

    Returns:
        RGB picture, `PICTURE_SIZE` square.
    """
    paper = rng.choice(_PAPERS)
    ink = rng.choice(_INKS if sum(paper) > 384 else _LIGHT_INKS)
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), paper)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((1, 1, PICTURE_SIZE - 2, PICTURE_SIZE - 2), outline=ink)
    slot = (PICTURE_SIZE - 8) / len(text)
    font = _font(rng.choice((20, 22, 24)))
    lift = rng.uniform(-5, 5)
    for index, character in enumerate(text):
        x = 4 + slot * (index + 0.5) + rng.uniform(-1, 1)
        y = PICTURE_SIZE / 2 + lift + rng.uniform(-1, 1)
        draw.text((x, y), character, fill=ink, font=font, anchor="mm")
    return picture


def random_shapes(rng: random.Random, count: int) -> tuple[Shape, ...]:
    """Shapes of different names that do not touch, in random order.

    Args:
        rng: Source of every choice.
        count: How many, 1 to 4.
    """
    while True:
        shapes: list[Shape] = []
        for _ in range(40):
            cells = rng.choice((2, 3))
            candidate = Shape(
                color=rng.choice(tuple(COLORS)),
                kind=rng.choice(SHAPES),
                column=rng.randint(0, CELLS - cells),
                row=rng.randint(0, CELLS - cells),
                cells=cells,
            )
            if all(_apart(candidate, other) for other in shapes):
                shapes.append(candidate)
            if len(shapes) == count:
                return tuple(shapes)


def draw_shapes(shapes: tuple[Shape, ...], rng: random.Random) -> Image.Image:
    """Draws the shapes on a light paper of random tone.

    Returns:
        RGB picture, `PICTURE_SIZE` square.
    """
    tone = rng.randint(225, 255)
    paper = tuple(min(255, tone + rng.randint(-8, 8)) for _ in range(3))
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), paper)
    draw = ImageDraw.Draw(picture)
    for shape in shapes:
        x0, y0, x1, y1 = shape.pixels()
        fill = tuple(max(0, min(255, c + rng.randint(-12, 12))) for c in COLORS[shape.color])
        edges = (x0, y0, x1 - 1, y1 - 1)
        if shape.kind == "square":
            draw.rectangle(edges, fill=fill)
        elif shape.kind == "circle":
            draw.ellipse(edges, fill=fill)
        else:
            draw.polygon([(x0, y1 - 1), (x1 - 1, y1 - 1), ((x0 + x1 - 1) / 2, y0)], fill=fill)
    return picture


def _apart(one: Shape, other: Shape) -> bool:
    if one.name == other.name:
        return False
    ax0, ay0, ax1, ay1 = one.pixels()
    bx0, by0, bx1, by1 = other.pixels()
    return ax1 <= bx0 or bx1 <= ax0 or ay1 <= by0 or by1 <= ay0


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
