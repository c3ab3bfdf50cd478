"""`generate()`: each of the four overrides, and the ways to decode."""

from __future__ import annotations

import pytest
import torch

from cogvlm_sft.errors import ModelInputError
from cogvlm_sft.model import CogVLMForCausalLM
from cogvlm_sft.model.modeling_cogvlm import build_position_ids

NEW = 6


@pytest.fixture
def tiny(small_config) -> CogVLMForCausalLM:
    return CogVLMForCausalLM(small_config()).eval()


def by_hand(model: CogVLMForCausalLM, batch: dict, steps: int = NEW) -> torch.Tensor:
    """Greedy continuation without `generate()` and without a cache."""
    ids, types = batch["input_ids"], batch["token_type_ids"]
    mask, pixels = batch["attention_mask"], batch.get("pixel_values")
    for _ in range(steps):
        logits = model(
            input_ids=ids, token_type_ids=types, attention_mask=mask, pixel_values=pixels
        ).logits
        ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), 1)
        types = torch.cat((types, types.new_zeros(len(ids), 1)), 1)
        mask = torch.cat((mask, mask.new_ones(len(ids), 1)), 1)
    return ids


def generate(model: CogVLMForCausalLM, batch: dict, **options) -> torch.Tensor:
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
    return model.generate(**batch, **{**settings, "eos_token_id": 95, **options})


def row_of(model: CogVLMForCausalLM, batch: dict, row: int, blocks: list[int]) -> dict:
    """One row of a left-padded batch, by itself and without its padding."""
    real = batch["attention_mask"][row].bool()
    alone = {k: v[row : row + 1, real] for k, v in batch.items() if k != "pixel_values"}
    if blocks[row]:
        first = sum(blocks[:row])
        alone["pixel_values"] = batch["pixel_values"][first : first + blocks[row]]
    return alone


@pytest.mark.parametrize("rows", [["i3"], ["i"], ["5"], ["i3", "7", "2i1i4", "i"]])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_full_forwards(tiny, make_batch, rows, use_cache):
    batch = make_batch(tiny.config, rows, "left")
    found = generate(tiny, batch, use_cache=use_cache, eos_token_id=-1)
    assert torch.equal(found, by_hand(tiny, batch))


def test_no_mask_given_does_not_hide_the_picture(tiny, make_batch):
    """Placeholders are pad ids, and transformers infers masks from pad ids."""
    batch = make_batch(tiny.config, ["i3"])
    assert (batch["input_ids"] == tiny.config.pad_token_id).any()
    expected = generate(tiny, batch)
    del batch["attention_mask"]
    assert torch.equal(generate(tiny, batch), expected)


def test_padding_on_the_right_is_refused(tiny, make_batch):
    """An answer after padding would be made of nothing, and transformers only warns."""
    batch = make_batch(tiny.config, ["i3", "7", "i"], "right")
    with pytest.raises(ModelInputError, match=r"padding in 2 of 3 rows; pad on the left"):
        generate(tiny, batch)
    generate(tiny, make_batch(tiny.config, ["i3", "i3"], "right"))  # none is needed


def test_positions_handed_to_every_step(tiny, make_batch, monkeypatch):
    batch = make_batch(tiny.config, ["i3", "2i"], "left")
    seen = []
    angles = tiny.model._angles
    monkeypatch.setattr(
        tiny.model, "_angles", lambda ids: (seen.append(ids.clone()), angles(ids))[1]
    )
    generate(tiny, batch)
    mask, types = (
        torch.nn.functional.pad(batch[k], (0, NEW), value=v)
        for k, v in (("attention_mask", 1), ("token_type_ids", 0))
    )
    whole = build_position_ids(types, mask)[:, :-1]
    assert torch.equal(torch.cat(seen, 1), whole)
    assert whole.max() < 4 + 3 + NEW + 2  # not one id a patch


def test_answer_straight_after_the_picture_is_text(tiny, make_batch):
    batch = make_batch(tiny.config, ["i"])
    kwargs = {"token_type_ids": batch["token_type_ids"], "use_cache": True}
    assert batch["token_type_ids"][0, -1] == 1
    updated = tiny._update_model_kwargs_for_generation({}, dict(kwargs), num_new_tokens=2)
    assert updated["token_type_ids"][0, -2:].tolist() == [0, 0]
    assert torch.equal(generate(tiny, batch, eos_token_id=-1), by_hand(tiny, batch))


@pytest.mark.parametrize("rows", [["2i1i4", "i3", "7"], ["7", "i", "1i1i1i2"], ["1i2i1", "3i1i2"]])
@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_keep_each_rows_images(tiny, make_batch, rows, use_cache):
    blocks = [row.count("i") for row in rows]
    batch = make_batch(tiny.config, rows, "left")
    options = {
        "num_beams": 3,
        "use_cache": use_cache,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    together = generate(tiny, batch, **options)
    for row in range(len(rows)):
        single = row_of(tiny, batch, row, blocks)
        alone = generate(tiny, single, **options)
        ids = alone.sequences
        assert torch.equal(together.sequences[row, -NEW:], ids[0, -NEW:])
        # Beams alone could see the wrong picture as well, and another picture may well make the
        # same words: the score is checked against one plain forward pass of the answer.
        expected = log_probability(tiny, single, ids) / NEW
        for found in (together.sequences_scores[row], alone.sequences_scores[0]):
            assert found.item() == pytest.approx(expected, abs=1e-4)


def log_probability(model: CogVLMForCausalLM, batch: dict, ids: torch.Tensor) -> float:
    """Of the last NEW tokens of one row, by one forward pass."""
    types = torch.nn.functional.pad(batch["token_type_ids"], (0, NEW))
    pixels = batch.get("pixel_values")
    logits = model(input_ids=ids, token_type_ids=types, pixel_values=pixels).logits
    chosen = logits[:, -NEW - 1 : -1].log_softmax(-1).gather(2, ids[:, -NEW:, None])
    return chosen.sum().item()


def test_beam_search_finds_at_least_the_greedy_score(tiny, make_batch):
    batch = make_batch(tiny.config, ["i4"])
    greedy, beams = generate(tiny, batch), generate(tiny, batch, num_beams=8)
    assert log_probability(tiny, batch, beams) >= log_probability(tiny, batch, greedy)


def test_sampling_and_several_answers(tiny, make_batch):
    batch = make_batch(tiny.config, ["1i1i2", "3"], "left")
    options = {"do_sample": True, "num_return_sequences": 2, "top_k": 1}
    found = generate(tiny, batch, **options)
    assert torch.equal(found[0::2], generate(tiny, batch))
    assert torch.equal(found[1::2], found[0::2])
    torch.manual_seed(3)
    first = generate(tiny, batch, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(generate(tiny, batch, do_sample=True), first)


def test_pictures_are_seen_once(tiny, make_batch):
    calls = []
    tiny.model.vision.register_forward_hook(lambda *_: calls.append(1))
    generate(tiny, make_batch(tiny.config, ["i3", "i1"], "left"))
    assert len(calls) == 1


def test_continuing_a_cache(tiny, make_batch):
    batch = make_batch(tiny.config, ["i3"])
    first = generate(tiny, batch, return_dict_in_generate=True)
    more = {"input_ids": torch.cat((first.sequences, torch.tensor([[5, 6]])), 1)}
    more["token_type_ids"] = torch.nn.functional.pad(batch["token_type_ids"], (0, NEW + 2))
    fresh = generate(tiny, {**more, "pixel_values": batch["pixel_values"]})
    cache = first.past_key_values
    assert torch.equal(generate(tiny, {**more, "past_key_values": cache}), fresh)


def test_beams_with_wrong_images(tiny, make_batch):
    batch = make_batch(tiny.config, ["i3", "i2"], "left")
    batch["pixel_values"] = batch["pixel_values"][:1]
    with pytest.raises(ModelInputError, match="Image features and image tokens do not match"):
        generate(tiny, batch, num_beams=2)
