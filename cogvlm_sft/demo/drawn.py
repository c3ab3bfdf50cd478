"""Drawn pictures of the demo: signs to read and coloured shapes to find.

Pictures are drawn with Pillow and its built-in font, so that nothing is downloaded and the truth is
exact. Notable choices: a sign holds one or two capitals or digits, each in a slot of one patch's
width with jitter, so that reading an unseen word means reading its letters; shapes stand on a grid
of four cells, so that a model of two million parameters can learn their corners in minutes; the
paper is dark and the ink light, since at full contrast the same model learns several times faster
than on grey. Every draw comes from a `random.Random` that the caller seeds: the same seed gives the
same bytes.
"""

import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from data_builders.boxes import thousandths

PICTURE_SIZE = 56
CELLS = 4
CELL = PICTURE_SIZE // CELLS
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
SHAPES = ("square", "circle", "triangle")
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 220),
    "yellow": (240, 220, 40),
    "purple": (130, 40, 170),
    "orange": (250, 130, 20),
}
_PAPERS = ((0, 0, 0), (14, 12, 24), (24, 14, 10))
_INKS = ((250, 250, 250), (255, 240, 150), (200, 255, 255))


@dataclass(frozen=True, slots=True)
class Shape:
    """A coloured shape on the grid.

    Attributes:
        color: Key of `COLORS`.
        kind: One of `SHAPES`.
        column, row: Upper left cell, counted from 0.
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
    return f"[[{thousandths(box, *size)}]]"


def draw_sign(text: str, rng: random.Random) -> Image.Image:
    """A sign with one to four characters in light ink, from the left.

    Args:
        text: Capitals or digits.
        rng: Source of colours, sizes and jitter.

    Returns:
        RGB picture, `PICTURE_SIZE` square.
    """
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), rng.choice(_PAPERS))
    draw = ImageDraw.Draw(picture)
    ink = rng.choice(_INKS)
    font = _font(rng.choice((15, 16)))
    middle = CELL * 1.5
    for index, character in enumerate(text):
        x = CELL * (index + 0.5) + rng.uniform(-1, 1)
        y = middle + rng.uniform(-1, 1)
        draw.text((x, y), character, fill=ink, font=font, anchor="mm")
    return picture


def random_shapes(rng: random.Random, count: int) -> tuple[Shape, ...]:
    """Shapes of different colours that do not overlap, in random order.

    Args:
        rng: Source of every choice.
        count: How many, 1 to 3.
    """
    while True:
        shapes: list[Shape] = []
        for _ in range(40):
            cells = 1
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
    """Draws the shapes; tones vary a little from picture to picture.

    Returns:
        RGB picture, `PICTURE_SIZE` square.
    """
    paper = _vary((8, 8, 8), 8, rng)
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), paper)
    draw = ImageDraw.Draw(picture)
    for shape in shapes:
        x0, y0, x1, y1 = shape.pixels()
        fill = _vary(COLORS[shape.color], 12, rng)
        edges = (x0, y0, x1 - 1, y1 - 1)
        if shape.kind == "square":
            draw.rectangle(edges, fill=fill)
        elif shape.kind == "circle":
            draw.ellipse(edges, fill=fill)
        else:
            draw.polygon([(x0, y1 - 1), (x1 - 1, y1 - 1), ((x0 + x1 - 1) / 2, y0)], fill=fill)
    return picture


def _vary(color: tuple[int, int, int], span: int, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, c + rng.randint(-span, span))) for c in color)
    return red, green, blue


def _apart(one: Shape, other: Shape) -> bool:
    if one.color == other.color:
        return False
    ax0, ay0, ax1, ay1 = one.pixels()
    bx0, by0, bx1, by1 = other.pixels()
    return ax1 <= bx0 or bx1 <= ax0 or ay1 <= by0 or by1 <= ay0


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
