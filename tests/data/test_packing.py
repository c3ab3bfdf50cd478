"""Shared pictures: loss and every gradient are those of the separate rows."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cogvlm_sft.data.packing import SharedImageCollator
from cogvlm_sft.errors import DataError, ModelInputError
from cogvlm_sft.model import CogVLMConfig, CogVLMForCausalLM

SIDE = 56  # 16 patches: a picture takes 18 tokens, and 6 in the second generation


def config(**changes: Any) -> CogVLMConfig:
    vision = {
        "hidden_size": 24, "image_size": SIDE, "intermediate_size": 32, "num_heads": 2,
        "num_hidden_layers": 2, "num_positions": 17, "patch_size": 14,
    }  # fmt: skip
    fields = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "initializer_range": 0.2, "vision_config": vision,
    }  # fmt: skip
    return CogVLMConfig(**{**fields, **changes})


@pytest.fixture
def pixels() -> dict[str, torch.Tensor]:
    return {name: torch.randn(1, 3, SIDE, SIDE) for name in "abcd"}


def conversation(
    pixels: dict[str, torch.Tensor], shape: str, seed: int, block: int = 18
) -> dict[str, Any]:
    """An item: a letter is a picture, `5` five words, `+3` an answer of three words."""
    generator = torch.Generator().manual_seed(seed)
    ids, types, labels, pictures = [1], [0], [-100], []
    answer = False
    for letter in shape:
        if letter == "+":
            answer = True
            continue
        if letter.isalpha():
            ids += [0] * block
            types += [1] * block
            labels += [-100] * block
            pictures.append(letter)
            continue
        words = torch.randint(3, 96, (int(letter),), generator=generator).tolist()
        ids += words
        types += [0] * len(words)
        labels += words if answer else [-100] * len(words)
        answer = False
    none = torch.zeros(0, 3, SIDE, SIDE)
    return {
        "input_ids": ids, "token_type_ids": types, "labels": labels,
        "pictures": tuple(pictures), "images": torch.cat([none, *(pixels[p] for p in pictures)]),
    }  # fmt: skip


def processor(model: Any) -> Any:
    """What the collator asks a processor for."""
    return SimpleNamespace(num_image_tokens=model.config.num_image_tokens)


def separately(model: Any, items: Sequence[dict[str, Any]], count: int) -> torch.Tensor:
    """Loss of rows computed one by one by the plain forward pass, gradients accumulated."""
    total = torch.zeros(())
    for item in items:
        columns = {
            name: torch.tensor([item[name]]) for name in ("input_ids", "token_type_ids", "labels")
        }
        images = item["images"] if len(item["images"]) else None
        loss = model(**columns, pixel_values=images, num_items_in_batch=count).loss
        loss.backward()
        total += loss.detach()
    return total


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(model: Any, items: list[dict[str, Any]], rows: list[list[int]]) -> None:
    """Packed into `rows` (accumulated), the items give what they give by themselves."""
    count = sum(sum(label != -100 for label in item["labels"][1:]) for item in items)
    expected_loss = separately(model, items, count)
    expected = gradients(model)
    collate = SharedImageCollator(processor(model))
    loss = torch.zeros(())
    for row in rows:
        batch = collate([items[number] for number in row])
        part = model(**batch, supervised_only=True, num_items_in_batch=count).loss
        part.backward()
        loss += part.detach()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-8)
        assert error <= 1e-5, f"{name}: {error:.2e}"


# One picture by 1, 2 and 4 conversations; several turns; no prompt (a caption) twice, so that two
# first words hang on one place; text only between; a second picture inside a branch; an item that
# begins with text before its picture; two branches of one length.
MIXED = [
    "a4+3", "b2+2", "a+5", "7+2", "a2+2+3+1", "b9+9", "a+4", "a3+2", "c3d1+3", "2a1+2", "b9+1",
]  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("key_heads", [None, 2], ids=["first generation", "second generation"])
def test_exact(pixels: Any, attention: str, key_heads: int | None) -> None:
    model = CogVLMForCausalLM(config(num_multi_query_heads=key_heads)).train()
    model.set_attn_implementation(attention)
    block = model.config.num_image_tokens
    items = [conversation(pixels, shape, seed, block) for seed, shape in enumerate(MIXED)]
    everything = list(range(len(items)))
    assert_equal(model, items, [everything])
    # Accumulated over two rows, with some of each picture's conversations in either.
    assert_equal(model, items, [everything[::2], everything[1::2]])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_exact_with_adapters(pixels: Any) -> None:
    """Low-rank factors on every linear of both experts: queries are then cut from fused ones."""
    model = CogVLMForCausalLM(config())
    targets = r".*layers\.\d+\.(self_attn\..*(query_key_value|dense)|mlp\..*_proj)"
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    items = [conversation(pixels, shape, seed) for seed, shape in enumerate(MIXED)]
    tuned.train()
    assert_equal(tuned, items, [list(range(len(items)))])


def test_exact_with_checkpointing_and_long_prompts(pixels: Any) -> None:
    """Own attention over more than one block of the kernel, recomputed in the backward pass."""
    model = CogVLMForCausalLM(config(max_position_embeddings=1024)).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    shapes = ["a" + "9" * 25 + "+3", "a9+3", "9" * 40 + "+5+2"]
    items = [conversation(pixels, shape, seed) for seed, shape in enumerate(shapes)]
    assert_equal(model, items, [[0, 1, 2]])


def test_a_row_is_one_prefix_and_its_branches(pixels: Any) -> None:
    collate = SharedImageCollator(SimpleNamespace(num_image_tokens=18))  # type: ignore[arg-type]
    items = [conversation(pixels, shape, 0) for shape in ("a2+2", "5+2", "a+3")]
    batch = collate(items)
    # BOS, boi and 16 patches once; eoi, 2 and 2 words; eoi and 3 words; BOS, 5 and 2 words.
    assert batch["segments"].tolist() == [[0, 18, -1], [18, 23, 0], [23, 27, 0], [27, 35, -1]]
    assert batch["input_ids"].shape == (1, 35)
    assert batch["pixel_values"].shape[0] == 1
    assert batch["position_ids"][0, [0, 1, 2, 17, 18, 19, 23, 24, 27, 28]].tolist() == [
        0, 1, 2, 2, 3, 4, 3, 4, 0, 1,
    ]  # fmt: skip


def test_attention_does_not_cross_groups_or_branches(pixels: Any) -> None:
    model = CogVLMForCausalLM(config()).eval()
    collate = SharedImageCollator(processor(model))
    items = [
        conversation(pixels, shape, seed) for seed, shape in enumerate(["a4+3", "a4+3", "5+3"])
    ]
    before = collate(items)
    items[0]["input_ids"][24] = 90
    after = collate(items)
    logits = [
        model(**{k: v for k, v in b.items() if k != "labels"}).logits for b in (before, after)
    ]
    changed = (logits[0] != logits[1]).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [24, 25]  # the word itself, and the one behind


def test_without_an_answer_to_learn_there_is_no_step(pixels: Any) -> None:
    collate = SharedImageCollator(SimpleNamespace(num_image_tokens=18))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="2 row"):
        collate([conversation(pixels, "a3", 0), conversation(pixels, "a2", 1)])


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ([[0, 18, -1], [19, 27, 0]], "segment 1 is"),
        ([[0, 18, 0], [18, 27, 0]], "segment 0 is"),
        ([[0, 18, -1], [18, 22, 0], [22, 27, 1]], "segment 2 is"),
        ([[0, 18, -1]], "cover 18 tokens of a run of 27"),
    ],
)
def test_segments_must_fit(pixels: Any, segments: list[list[int]], words: str) -> None:
    model = CogVLMForCausalLM(config())
    batch = SharedImageCollator(processor(model))([conversation(pixels, "a5+3", 0)])
    batch["segments"] = torch.tensor(segments)
    with pytest.raises(ModelInputError, match=words):
        model(**batch, supervised_only=True)


def test_segments_go_without_a_cache(pixels: Any) -> None:
    model = CogVLMForCausalLM(config()).eval()
    batch = SharedImageCollator(processor(model))([conversation(pixels, "a5+3", 0)])
    with pytest.raises(ModelInputError, match="a cache"):
        model(**batch, use_cache=True)
