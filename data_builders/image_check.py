"""Decides whether a picture file can be used, by decoding all of it.

Headers and Pillow's `verify` do not see a truncated file, so nothing less than decoding all of it
is trusted. Only a JPEG's last step, the inverse transform of coefficients that are all decoded by
then, is done at a fraction of its scale: nothing can be wrong there. Kinds that other readers trip
over (GIF, CMYK, transparency, 16-bit, palettes, pictures turned by their EXIF tag, a wrong
extension) are usable: they are converted here once to prove it, and named in the manifest. The file
stays where it is, since the training reader converts in the same way; `data export` writes
converted copies for trainers that would not. Decompression bombs and extreme shapes are refused by
their header, before a pixel is decoded.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"), "MPO": (".jpg", ".jpeg", ".jfif"), "PNG": (".png",),
    "GIF": (".gif",), "BMP": (".bmp",), "WEBP": (".webp",), "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pnm"), "JPEG2000": (".jp2",),
}  # fmt: skip
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_PLAIN = ("RGB", "L")
_ORIENTATION = 0x0112
# A JPEG's sides may shrink to this, twice the side that the perceptual hash is made of: decoding
# takes two thirds of the time, and hashes differ in 0.2 of 64 bits on average from full scale.
_DRAFT = 64


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What counts as a usable picture.

    Attributes:
        min_side: Shortest side in pixels (LLaMA-Factory's Qwen2-VL limit, 28).
        max_aspect: Longest side over shortest side (200, same source).
        max_pixels: Above this a picture is taken for a decompression bomb.
    """

    min_side: int = 28
    max_aspect: float = 200.0
    max_pixels: int = 89_000_000


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What decoding a picture showed.

    Attributes:
        reason: Why it is unusable; None if it is usable.
        width: Pixels, after the EXIF rotation.
        height: Pixels, after the EXIF rotation.
        kind: Format and mode, such as `JPEG RGB`.
        phash: 64-bit perceptual hash; None where none was asked for.
        oddities: What a careless reader would get wrong, such as `turned_by_exif`.
    """

    reason: str | None
    width: int = 0
    height: int = 0
    kind: str = ""
    phash: int | None = None
    oddities: tuple[str, ...] = ()


def check_image(path: Path, limits: ImageLimits, hashed: bool = False) -> ImageFacts:
    """Decodes all of a picture's file.

    Args:
        path: The file.
        limits: What counts as usable.
        hashed: Whether to compute the perceptual hash.
    """
    try:
        return _check(path, limits, hashed)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return ImageFacts("image_too_large")
    except UnidentifiedImageError:
        empty = path.is_file() and path.stat().st_size == 0
        return ImageFacts("image_empty_file" if empty else "image_not_an_image")
    except FileNotFoundError:
        return ImageFacts("image_missing")
    except PermissionError:
        return ImageFacts("image_not_readable")
    except OSError as error:
        short = "truncated" in str(error) or "broken data stream" in str(error)
        return ImageFacts("image_truncated" if short else "image_broken")
    except Exception:
        # Pillow's plugins raise whatever a broken file provokes (SyntaxError, struct.error,
        # ValueError, EOFError, zlib.error); all mean the same here.
        return ImageFacts("image_broken")


def _check(path: Path, limits: ImageLimits, hashed: bool) -> ImageFacts:
    with Image.open(path) as image:
        width, height = image.size
        if width * height > limits.max_pixels:
            return ImageFacts("image_too_large", width, height)
        if min(width, height) < limits.min_side:
            return ImageFacts("image_too_small", width, height)
        if max(width, height) > limits.max_aspect * min(width, height):
            return ImageFacts("image_too_long", width, height)
        kind = f"{image.format} {image.mode}"
        odd = oddities(image, path.suffix)
        if not odd:  # an odd one is decoded at full scale, since it is converted
            image.draft(None, (_DRAFT, _DRAFT))
        image.load()
        if "turned_by_exif" in odd and image.getexif()[_ORIENTATION] >= 5:
            width, height = height, width
        usable = upright_rgb(image) if odd else image
        phash = perceptual_hash(usable) if hashed else None
    return ImageFacts(None, width, height, kind, phash, odd)


def oddities(image: Image.Image, suffix: str) -> tuple[str, ...]:
    """What a reader that only decodes would get wrong about an opened picture.

    Args:
        image: Opened; need not be decoded.
        suffix: The ending of its file's name.
    """
    found = []
    # Most JPEG files have no EXIF at all; asking Pillow costs a twentieth of decoding them.
    bare = image.format == "JPEG" and not ("exif" in image.info or "xmp" in image.info)
    if not bare and image.getexif().get(_ORIENTATION, 1) in range(2, 9):
        found.append("turned_by_exif")
    if image.mode not in _PLAIN:
        if image.mode == "CMYK":
            found.append("cmyk")
        elif image.mode in _SIXTEEN_BIT or image.mode == "F":
            found.append("deep_grey")
        elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            found.append("transparent")
        elif image.mode == "P":
            found.append("palette")
        else:
            found.append("other_mode")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        found.append("several_frames")
    if suffix.lower() not in _ENDINGS.get(image.format or "", (suffix.lower(),)):
        found.append("wrong_extension")
    return tuple(found)


def upright_rgb(image: Image.Image, background: str | None = None) -> Image.Image:
    """A picture of any kind as upright RGB, the same pixels as training reads.

    It repeats `cogvlm_sft.model`'s `to_rgb`, which loads torch; a test holds the two together.

    Args:
        image: Opened; its first frame counts.
        background: A colour to put behind transparent parts; without one, transparency is dropped,
            as the released CogVLM code does.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT:
        # Pillow clips 16-bit grey to 255, which turns almost every such picture white.
        grey = np.asarray(image, dtype=np.int64)
        image = Image.fromarray((grey >> 8 if grey.max() > 255 else grey).astype(np.uint8))
    if image.mode in ("P", "LA", "PA"):
        image = image.convert("RGBA")
    if background is not None and image.mode == "RGBA":
        flat = Image.new("RGB", image.size, background)
        flat.paste(image, mask=image.getchannel("A"))
        return flat
    return image.convert("RGB")


def perceptual_hash(image: Image.Image) -> int:
    """The 64-bit DCT hash of imagehash, as an integer.

    Args:
        image: Upright, in RGB or grey.
    """
    import imagehash

    # imagehash shrinks to 32 by 32 itself, by a filter as wide as the picture: six times slower,
    # for a hash that differs in 0.2 of 64 bits on average.
    small = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return int(str(imagehash.phash(small)), 16)


class CheckStage:
    """Checks pictures below a root: a pure function of their files, for any process."""

    def __init__(self, root: Path, limits: ImageLimits, hashed: bool) -> None:
        self.root = root
        self.limits = limits
        self.hashed = hashed

    def run(self, paths: list[str]) -> list[ImageFacts]:
        """Facts of each picture, in order.

        Args:
            paths: Relative to the root.
        """
        # of corrupt EXIF and the like; the outcome says enough
        with warnings.catch_warnings(action="ignore"):
            return [check_image(self.root / path, self.limits, self.hashed) for path in paths]
