"""Logits of a model that need not fit into memory, to compare two ways of holding the same weights.

The model stands on the meta device; each block (a layer, the embeddings, the GLU, the head) gets
its weights in fp32 just before it runs and gives them back after. A 17B model is compared so on a
machine that could never load it in fp32.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from tqdm import tqdm

from cogvlm_sft.model import CogVLMConfig, CogVLMForCausalLM

Weights = Callable[[str], torch.Tensor]  # parameter name -> its weights
_WORDS = 24  # text tokens of the probe, behind one picture


def probe_batch(config: CogVLMConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """One row of noise that every part sees: BOS, a picture, words; (1, length) and pixels."""
    generator = torch.Generator().manual_seed(seed)
    side, block = config.vision_config.image_size, config.num_image_tokens
    words = torch.randint(0, config.vocab_size, (1, 1 + block + _WORDS), generator=generator)
    types = torch.zeros_like(words)
    types[:, 1 : 1 + block] = 1
    return {
        "input_ids": words,
        "token_type_ids": types,
        "pixel_values": torch.randn(
            1, config.vision_config.in_channels, side, side, generator=generator
        ),
    }


@torch.no_grad()
def streamed_logits(
    model: CogVLMForCausalLM, weights: Weights, batch: dict[str, torch.Tensor], title: str
) -> torch.Tensor:
    """Run a model of the meta device block by block.

    Args:
        model: on the meta device, with or without LoRA layers; it is left there.
        weights: gives the tensor of a parameter by its name in this model, of any dtype.
        batch: see `probe_batch`.
        title: of the progress bar.

    Returns:
        (1, length, vocabulary) in fp32, on the CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def fetch(name: str) -> torch.Tensor:
        return weights(name).to(device, torch.float32)

    blocks = dict(_blocks(model))
    handles = []
    with tqdm(total=len(blocks), desc=title, unit="block") as bar:
        for prefix, block in blocks.items():

            def fill(module: nn.Module, *_: object, prefix: str = prefix) -> None:
                state = {name: fetch(f"{prefix}.{name}") for name, _ in module.named_parameters()}
                module.load_state_dict(state, strict=False, assign=True)

            def empty(module: nn.Module, *_: object) -> None:
                module.to("meta")
                bar.update()

            handles.append(block.register_forward_pre_hook(fill))
            handles.append(block.register_forward_hook(empty))
        vision = model.model.vision
        for name in ("boi", "eoi"):
            setattr(vision, name, nn.Parameter(fetch(f"model.vision.{name}"), requires_grad=False))
        try:
            placed = {name: tensor.to(device) for name, tensor in batch.items()}
            logits: torch.Tensor = model(**placed, use_cache=False).logits.float().cpu()
        finally:
            for handle in handles:
                handle.remove()
            model.to("meta")
    return logits


def _blocks(model: CogVLMForCausalLM) -> Iterator[tuple[str, nn.Module]]:
    """The parts that are filled and emptied together, in the order in which they run."""
    vision = "model.vision"
    for name, module in model.named_modules():
        layer = name.rpartition(".")[2].isdigit() and ".layers." in name
        if layer or name in (
            "model.embed_tokens",
            "model.norm",
            "lm_head",
            f"{vision}.patch_embedding",
            f"{vision}.conv",
            f"{vision}.linear_proj",
        ):
            yield name, module
