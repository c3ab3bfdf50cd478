"""Pictures to pixel values, with PIL and NumPy alone.

The released transform (Hugging Face and SAT code agree): RGB, bicubic resize to a square whatever
the aspect ratio, divide by 255, CLIP mean and standard deviation; the same in training and
inference, no augmentation. Notable choices: the arithmetic is float32 in the order of the released
code, so the values equal `PIL.Image.resize` plus normalisation to the last bit; a picture is turned
upright by its EXIF tag first (the released code leaves phone pictures on their side); transparency
is dropped, not painted over, as PIL's `convert("RGB")` does in the released code. torchvision is
never imported.
"""

from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from cogvlm_sft.errors import ModelInputError

_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class CogVLMImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What CogVLM's transform takes beyond transformers' own image options.

    Attributes:
        patch_size: Side of a patch in pixels.
        grid_stride: 1; 2 for CogVLM2, whose convolution halves the grid of patches.
    """

    patch_size: int | None
    grid_stride: int | None


def to_rgb(image: Any) -> Image.Image:
    """One picture as an upright RGB image.

    Args:
        image: A PIL image of any mode, or an array or tensor in (H, W), (H, W, C) or (C, H, W).
    """
    if not isinstance(image, Image.Image):
        image = to_pil_image(image)
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT:
        # PIL clips 16-bit grey to 255, which turns almost every such picture white.
        grey = np.asarray(image, dtype=np.int64)
        image = Image.fromarray((grey >> 8 if grey.max() > 255 else grey).astype(np.uint8))
    elif image.mode == "P":
        # The direct way to RGB warns about palettes with transparency; the colours are the same.
        image = image.convert("RGBA")
    return image.convert("RGB")


class CogVLMImageProcessor(PilBackend):
    """Resizes to a square and normalises.

    Attributes:
        size: `{"height": S, "width": S}` in pixels; 490 in the released chat model.
        patch_size: Side of a patch in pixels.
        grid_stride: 1; 2 for CogVLM2, whose convolution halves the grid of patches.
    """

    valid_kwargs = CogVLMImageProcessorKwargs
    model_input_names = ["pixel_values"]  # noqa: RUF012
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 490, "width": 490}  # noqa: RUF012
    default_to_square = True
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_convert_rgb = True
    patch_size = 14
    grid_stride = 1

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        height, width = self.size["height"], self.size["width"]
        step = self.patch_size * self.grid_stride
        if height != width or height % step:
            raise ModelInputError(
                f"image size is {height} x {width}, expected a square whose side is a multiple of "
                f"{step} (patch_size {self.patch_size} x grid_stride {self.grid_stride})"
            )

    @classmethod
    def for_config(cls, config: Any) -> "CogVLMImageProcessor":
        """The transform that a model's configuration asks for.

        Args:
            config: A `CogVLMConfig`.
        """
        vision = config.vision_config
        return cls(
            size={"height": vision.image_size, "width": vision.image_size},
            patch_size=vision.patch_size,
            grid_stride=2 if config.is_cogvlm2 else 1,
        )

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one picture: its patches, boi and eoi (1227 at 490 px, 258 at 224 px)."""
        return (self.size["height"] // (self.patch_size * self.grid_stride)) ** 2 + 2

    def process_image(self, image: Any, **kwargs: Any) -> Image.Image:
        """One picture of any kind as an upright RGB image."""
        return to_rgb(image) if kwargs.get("do_convert_rgb", True) else to_pil_image(image)

    def _preprocess(
        self,
        images: list[Image.Image],
        *,
        do_resize: bool,
        size: SizeDict,
        resample: int,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        return_tensors: str | None = None,
        do_center_crop: bool | None = None,
        do_pad: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """RGB images to pixel values (images, 3, S, S), float32."""
        if do_center_crop or do_pad:
            raise ModelInputError("CogVLM's transform neither crops nor pads; it resizes only")
        mean = np.asarray(image_mean, dtype=np.float32)
        std = np.asarray(image_std, dtype=np.float32)
        pixel_values = []
        for image in images:
            if do_resize:
                image = image.resize((size["width"], size["height"]), resample=resample)
            values = np.asarray(image, dtype=np.float32)
            if do_rescale:
                # Dividing by 255 and multiplying by 1/255 differ in the last bit.
                values = values / np.float32(round(1 / rescale_factor, 6))
            if do_normalize:
                values = (values - mean) / std
            pixel_values.append(np.ascontiguousarray(values.transpose(2, 0, 1)))
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)


__all__ = ["CogVLMImageProcessor", "to_rgb"]
