"""Pixel values are PIL's bicubic resize plus CLIP normalisation, for every kind of picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from cogvlm_sft import CogVLMConfig, ModelInputError
from cogvlm_sft.model import CogVLMImageProcessor

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def photo(width: int = 61, height: int = 37) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


def expected(image: Image.Image, size: int) -> np.ndarray:
    resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    values = np.asarray(resized).astype(np.float32) / 255
    return ((values - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [28, 56, 490])
def test_values_equal_pil(size: int) -> None:
    output = CogVLMImageProcessor(size=size)(photo(), return_tensors="pt")["pixel_values"]
    assert output.shape == (1, 3, size, size) and output.dtype == torch.float32
    assert np.array_equal(output[0].numpy(), expected(photo(), size))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "CMYK", "P", "1", "YCbCr"])
def test_modes(mode: str) -> None:
    picture = photo().convert(mode)
    output = CogVLMImageProcessor(size=28)(picture)["pixel_values"][0]
    assert np.array_equal(output, expected(picture, 28))


def test_palette_with_transparency_does_not_warn(tmp_path: Path) -> None:
    picture = photo().convert("P")
    picture.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    with Image.open(tmp_path / "palette.png") as opened:
        output = CogVLMImageProcessor(size=28)(opened)["pixel_values"][0]
    assert np.array_equal(output, expected(picture, 28))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (20, 20))
    deep = Image.fromarray((grey * 257).astype(np.uint16))
    output = CogVLMImageProcessor(size=28)(deep)["pixel_values"][0]
    assert np.array_equal(output, expected(Image.fromarray(grey.astype(np.uint8)), 28))


def test_exif_turns_the_picture_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    photo().save(tmp_path / "phone.png", exif=exif)
    with Image.open(tmp_path / "phone.png") as opened:
        output = CogVLMImageProcessor(size=28)(opened)["pixel_values"][0]
    upright = photo().transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(output, expected(upright, 28))


def test_arrays_and_tensors_are_pictures_too() -> None:
    values = np.asarray(photo())
    for given in (values, torch.from_numpy(values.transpose(2, 0, 1).copy())):
        output = CogVLMImageProcessor(size=28)(given)["pixel_values"][0]
        assert np.array_equal(output, expected(photo(), 28))


def test_token_counts_are_the_models() -> None:
    configs = [
        CogVLMConfig(),
        CogVLMConfig(vision_config={"image_size": 224, "num_positions": 257}),
    ]
    configs.append(
        CogVLMConfig(
            num_multi_query_heads=8, vision_config={"image_size": 1344, "num_positions": 9217}
        )
    )
    for config, count in zip(configs, [1227, 258, 2306], strict=True):
        processor = CogVLMImageProcessor.for_config(config)
        assert processor.num_image_tokens == config.num_image_tokens == count
        assert processor.size["height"] == config.vision_config.image_size


def test_round_trip(tmp_path: Path) -> None:
    CogVLMImageProcessor(size=56, grid_stride=2).save_pretrained(tmp_path)
    CogVLMConfig().save_pretrained(tmp_path)
    for loaded in (
        CogVLMImageProcessor.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path),
    ):
        assert isinstance(loaded, CogVLMImageProcessor)
        assert loaded.num_image_tokens == 6
        assert np.array_equal(loaded(photo())["pixel_values"][0], expected(photo(), 56))


def test_impossible_sizes() -> None:
    with pytest.raises(ModelInputError, match=r"30 x 30.*multiple of 14"):
        CogVLMImageProcessor(size=30)
    with pytest.raises(ModelInputError, match="28 x 42"):
        CogVLMImageProcessor(size={"height": 28, "width": 42})
    with pytest.raises(ModelInputError, match="resizes only"):
        CogVLMImageProcessor(size=28, do_center_crop=True, crop_size=28)(photo())
