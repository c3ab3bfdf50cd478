"""Training steps at the layer shapes of CogVLM-17B on a GPU: ms, TFLOP/s, MFU, peak GiB.

    python -m benchmarks.gpu [--layers N] [--tower-layers N] [--rounds N] [--smoke]

Needs torch 2.11 and transformers 5.17 and neither trl, datasets nor bitsandbytes. Fewer layers than
the model's 32 and 63 stand for all of them: every layer does the same. A step is forward, backward
and fused AdamW under bf16 autocast with fp32 masters, the tower frozen in bf16. First, attention by
flash kernels and by FlexAttention is compared with a dense mask, packed and not. `--smoke` runs the
same on a tiny model, on any device.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import report
from benchmarks.models import RESULTS, items_of, padded, shared
from cogvlm_sft.model import CogVLMConfig, CogVLMForCausalLM
from cogvlm_sft.training.flops import Work, training_flops

TRAINED = ("language", "visual_expert", "adapter", "embeddings")
TINY = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2,
    "vision_config": {"hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
                      "image_size": 56, "num_positions": 17},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tower-layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not given.smoke:
        parser.error("no GPU here; --smoke runs a tiny model on the CPU")
    device = torch.device("cuda" if cuda else "cpu")
    peak = matmul_peak(device)
    fields: dict[str, Any] = dict(TINY) if given.smoke else {"vision_config": {}}
    fields["num_hidden_layers"] = given.layers
    fields["vision_config"] = {**fields["vision_config"], "num_hidden_layers": given.tower_layers}
    exact = check(device)
    rows = []
    kinds = [("sdpa", False, "none"), ("sdpa", False, "mlp"), ("sdpa", False, "layer")]
    kinds += [("sdpa", True, "none"), ("flex_attention", False, "none")] if cuda else []
    for attention, compiled, recomputed in kinds:
        try:
            rows += measure(fields, given, device, attention, compiled, recomputed, peak)
        except torch.OutOfMemoryError:
            rows.append({"attention": attention, "compiled": compiled, "recomputed": recomputed,
                         "batch": "out of memory"})  # fmt: skip
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    names = list(max(rows, key=len))
    rows = [{name: row.get(name) for name in names} for row in rows]
    report("gpu", rows, RESULTS, matmul_tflops=peak / 1e12, difference_from_dense_mask=exact)


def matmul_peak(device: torch.device) -> float:
    """Operations a second of a large bf16 product (fp32 on a CPU)."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: left @ right, 5, device))


def timed(work: Callable[[], Any], rounds: int, device: torch.device) -> list[float]:
    """Seconds of each round after two that do not count."""
    import time

    found = []
    for number in range(-2, rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 0:
            found.append(time.perf_counter() - started)
    return found


def check(device: torch.device) -> dict[str, float]:
    """Largest relative difference of a parameter's gradient from attention by a dense mask."""
    torch.manual_seed(0)
    config = CogVLMConfig(**{**TINY, "num_hidden_layers": 2})  # type: ignore[arg-type]
    model = CogVLMForCausalLM(config).train().to(device)
    items = items_of(config, [9, 5, 7, 30, 3], 2, per_picture=3)
    found = {}
    ways = ["sdpa", "flex_attention"] if device.type == "cuda" else ["sdpa"]
    for name, batch in (("separate", padded(items)), ("packed", shared(config, items))):
        batch = {key: value.to(device) for key, value in batch.items()}
        grads: dict[str, list[torch.Tensor]] = {}
        for way in ("eager", *ways):
            model.set_attn_implementation(way)
            model.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                model(**batch, supervised_only=True).loss.backward()
            grads[way] = [p.grad.float() for p in model.parameters() if p.grad is not None]
        for way in ways:
            found[f"{name}, {way}"] = max(
                float((a - b).norm() / b.norm().clamp(min=1e-6))
                for a, b in zip(grads[way], grads["eager"], strict=True)
            )
    return found


def measure(
    fields: dict[str, Any],
    given: argparse.Namespace,
    device: torch.device,
    attention: str,
    compiled: bool,
    recomputed: str,
    peak: float,
) -> list[dict[str, Any]]:
    """Steps on separate rows (8 pictures, 200 tokens of text each) and on packed ones (k = 4)."""
    torch.manual_seed(0)
    config = CogVLMConfig(**fields)
    with device:
        model = CogVLMForCausalLM(config).train()
    model.set_attn_implementation(attention)
    tower = (model.model.vision.patch_embedding, model.model.vision.transformer)
    for part in tower:
        part.requires_grad_(False)
        if device.type == "cuda":
            part.to(torch.bfloat16)
    model.recompute_mlp(recomputed == "mlp")
    if recomputed == "layer":
        model.activation_checkpointing_enable({"use_reentrant": False})
    if compiled:
        model.compile_layers()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    text, supervised = (200, 100) if not given.smoke else (20, 10)
    rows = []
    for name, k, conversations in (("separate", 1, 8), ("packed, k = 4", 4, 32)):
        items = items_of(config, [text] * conversations, supervised, per_picture=k)
        batch = shared(config, items) if k > 1 else padded(items)
        batch = {key: value.to(device) for key, value in batch.items()}

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(**batch, supervised_only=True).loss  # noqa: B023
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = sorted(timed(step, given.rounds, device))[given.rounds // 2]
        prefix, branch = config.num_image_tokens, text + 1
        if k == 1:
            prefix, branch = 0, config.num_image_tokens + 1 + text
        pictures = conversations // k
        work = Work(
            tokens=pictures * prefix + conversations * branch,
            squares=pictures * prefix**2 + conversations * (branch**2 + 2 * branch * prefix),
            images=pictures,
            supervised=supervised * conversations,
        )
        needed = training_flops(config, TRAINED, work)
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        rows.append(
            {
                "attention": attention, "compiled": compiled, "recomputed": recomputed,
                "batch": name, "tokens": work.tokens, "ms": 1e3 * seconds,
                "conversations/s": conversations / seconds, "TFLOP/s": needed / seconds / 1e12,
                "MFU": needed / seconds / peak, "peak GiB": memory,
            }
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
