"""Perplexity equals a loss computed by hand, however text is batched and cut."""

import math

import numpy as np
import pytest
import torch

from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.perplexity import score_texts
from cogvlm_sft.model import CogVLMForCausalLM, CogVLMProcessor

Tiny = tuple[CogVLMForCausalLM, CogVLMProcessor]
TEXTS = [("", "What digit is this?"), ("", "Where is the red square? " * 5), ("", "</s> 7")]


def test_the_loss_is_that_of_each_text_alone(tiny: Tiny) -> None:
    model, processor = tiny
    figures, rows = score_texts(model, processor, TEXTS, max_length=256, batch_size=3)
    loss = tokens = hits = 0.0
    for _, text in TEXTS:
        ids = processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        ids = torch.tensor([[processor.tokenizer.bos_token_id, *ids["input_ids"]]])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, :-1]
        logs = logits.log_softmax(-1)
        loss -= logs.gather(1, ids[0, 1:, None]).sum().item()
        hits += (logits.argmax(-1) == ids[0, 1:]).sum().item()
        tokens += ids.shape[1] - 1
    everything = np.arange(len(rows))
    perplexity, bits, first = (figure.statistic(everything) for figure in figures)
    assert perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    size = sum(len(text.encode()) for _, text in TEXTS)
    assert bits == pytest.approx(loss / math.log(2) / size, rel=1e-5)
    assert first == hits / tokens


def test_a_prompt_is_read_and_not_counted(tiny: Tiny) -> None:
    model, processor = tiny
    question, answer = "What digit is this?", "7"
    _, [row] = score_texts(model, processor, [(question, answer)], max_length=99)
    _, [whole] = score_texts(model, processor, [("", f"{question} {answer}")], max_length=99)
    _, [asked] = score_texts(model, processor, [("", question)], max_length=99)
    assert row["tokens"] == whole["tokens"] - asked["tokens"]
    assert row["loss"] == pytest.approx(whole["loss"] - asked["loss"], rel=1e-4)
    assert row["bytes"] == 1


def test_windows_hold_every_token_once(tiny: Tiny) -> None:
    model, processor = tiny
    _, whole = score_texts(model, processor, TEXTS, max_length=100)
    _, cut = score_texts(model, processor, TEXTS, max_length=9)
    assert len(cut) > len(whole)
    for column in ("tokens", "bytes"):
        assert sum(r[column] for r in cut) == pytest.approx(sum(r[column] for r in whole))
    assert all(row["tokens"] <= 8 for row in cut)


def test_a_window_must_fit_the_model(tiny: Tiny) -> None:
    with pytest.raises(DataError, match="expected 2 to 256"):
        score_texts(*tiny, TEXTS, max_length=257)
