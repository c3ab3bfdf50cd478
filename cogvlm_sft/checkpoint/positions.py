"""Another picture size for the same weights: the tower's position embedding, interpolated.

Everything else in a CogVLM is independent of the number of patches. The paper trains at 224 px and
goes on at 490 px this way (its second stage); any multiple of the patch size will do. The first row
belongs to the class token and stays as it is.
"""

import torch
from torch.nn import functional

from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.model import CogVLMConfig, CogVLMForCausalLM

POSITION_EMBEDDING = "model.vision.patch_embedding.position_embedding.weight"


def interpolate_positions(embedding: torch.Tensor, grid: int) -> torch.Tensor:
    """Position embedding for another grid of patches, bicubic, computed in fp32.

    Args:
        embedding: (1 + old grid squared, width), the class token's row first.
        grid: patches along one side of the new picture.

    Returns:
        (1 + grid squared, width), of the same dtype; the very same tensor where the grid is.

    Raises:
        CheckpointError: the rows are not one and a square.
    """
    old = round((embedding.shape[0] - 1) ** 0.5)
    if old < 1 or old * old + 1 != embedding.shape[0]:
        raise CheckpointError(
            f"a position embedding of {embedding.shape[0]} rows; expected 1 + a square of patches"
        )
    if old == grid:
        return embedding
    planes = embedding[1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(planes, (grid, grid), mode="bicubic", align_corners=False)
    patches = resized.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(embedding.dtype)
    return torch.cat((embedding[:1], patches))


def with_image_size(config: CogVLMConfig, image_size: int) -> CogVLMConfig:
    """The configuration for pictures of another size.

    Args:
        config: left as it is.
        image_size: side in pixels.

    Raises:
        CheckpointError: it is not a multiple of the patch size (twice that for CogVLM2).
    """
    fields = config.to_dict()
    patch = config.vision_config.patch_size
    step = patch * (2 if config.is_cogvlm2 else 1)
    if type(image_size) is not int or image_size < step or image_size % step:
        raise CheckpointError(
            f"image_size is {image_size}, expected a multiple of {step} "
            f"(patches of {patch} px{', halved by the convolution' if step > patch else ''})"
        )
    vision = fields["vision_config"]
    vision |= {"image_size": image_size, "num_positions": (image_size // patch) ** 2 + 1}
    return CogVLMConfig(**fields)


def resize_positions(model: CogVLMForCausalLM, image_size: int) -> None:
    """Fits a model, in place, to pictures of another size; its processor must be built anew.

    Raises:
        CheckpointError: see `with_image_size`.
    """
    config = with_image_size(model.config, image_size)
    embedding = model.model.vision.patch_embedding.position_embedding
    weight = interpolate_positions(embedding.weight.data, config.vision_config.grid)
    embedding.weight = torch.nn.Parameter(weight, requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = weight.shape[0]
    # One configuration object is shared by all modules.
    vision = model.config.vision_config
    vision.image_size = config.vision_config.image_size
    vision.num_positions = config.vision_config.num_positions
