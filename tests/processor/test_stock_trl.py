"""A stock TRL `SFTTrainer` trains our model and processor; nothing else of ours takes part."""

import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import is_chat_template_stop_token_trained

from cogvlm_sft import CogVLMConfig, CogVLMForCausalLM, CogVLMProcessor
from cogvlm_sft.model import CogVLMImageProcessor

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 220),
    "yellow": (220, 220, 30),
    "black": (20, 20, 20),
    "white": (235, 235, 235),
}
SIZE = 28
QUESTION = "Which colour?"


def picture(name: str, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-20, 20, (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8))


def rows(count: int, seed: int) -> list[tuple[Image.Image, str]]:
    names = [list(COLOURS)[index % len(COLOURS)] for index in range(count)]
    return [(picture(name, seed + index), name) for index, name in enumerate(names)]


def messages_format(picture: Image.Image, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": answer},
        ],
        "images": [picture],
    }


def completion_format(picture: Image.Image, answer: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": QUESTION}],
        "completion": [{"role": "assistant", "content": answer}],
        "images": [picture],
    }


@pytest.fixture
def processor(tokenizers_by_kind: dict[str, PreTrainedTokenizerBase]) -> CogVLMProcessor:
    return CogVLMProcessor(CogVLMImageProcessor(size=SIZE), tokenizers_by_kind["small"])


def model_for(processor: CogVLMProcessor) -> CogVLMForCausalLM:
    return CogVLMForCausalLM(
        CogVLMConfig(
            vocab_size=len(processor.tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.05,
            vision_config={
                "hidden_size": 32,
                "num_heads": 2,
                "num_hidden_layers": 1,
                "intermediate_size": 64,
                "image_size": SIZE,
                "num_positions": (SIZE // 14) ** 2 + 1,
            },
        )
    ).float()


@torch.no_grad()
def accuracy(
    model: CogVLMForCausalLM,
    processor: CogVLMProcessor,
    pictures: list[Image.Image],
    answers: list[str],
) -> float:
    model.eval()
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": picture},
                                      {"type": "text", "text": QUESTION}]}]
        for picture in pictures
    ]  # fmt: skip
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    output = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, eos_token_id=processor.tokenizer.eos_token_id
    )
    texts = processor.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    right = [text.strip() == answer for text, answer in zip(texts, answers, strict=True)]
    return sum(right) / len(right)


# TRL 1.16 sets the name of this option that transformers 5.23 deprecates, whatever one passes.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [messages_format, completion_format])
def test_stock_sft_trainer_learns_from_the_picture(
    make: Any, processor: CogVLMProcessor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = model_for(processor)
    columns = datasets.Features(
        {
            **{
                name: [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
                for name in make(picture("red", 0), "red")
                if name != "images"
            },
            "images": datasets.List(datasets.Image()),
        }
    )
    train = datasets.Dataset.from_list([make(*row) for row in rows(96, seed=0)], features=columns)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=40,
            per_device_train_batch_size=24,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            max_length=None,
            assistant_only_loss=make is messages_format,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=0,
        ),
        train_dataset=train,
        processing_class=processor,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    supervised = batch["labels"] != -100
    assert not (supervised & (batch["token_type_ids"] == 1)).any()
    assert (batch["token_type_ids"].sum(1) == processor.num_image_tokens).all()
    eos = processor.tokenizer.eos_token_id
    for ids, mask in zip(batch["input_ids"], supervised, strict=True):
        learned = ids[mask].tolist()
        assert processor.tokenizer.decode(learned[:-1]).strip() in COLOURS
        assert learned == processor.encode_answer(processor.tokenizer.decode(learned[:-1]))
        assert learned[-1] == eos
        prompt = processor.encode_prompt(QUESTION)["input_ids"]
        assert ids[: len(prompt)].tolist() == prompt
    trainer.train()

    held_out = rows(60, seed=10_000)
    pictures, answers = [list(column) for column in zip(*held_out, strict=True)]
    chance = 1 / len(COLOURS)
    assert accuracy(model, processor, pictures, answers) > 0.8
    random.Random(1).shuffle(pictures)
    assert accuracy(model, processor, pictures, answers) < chance + 0.2


@pytest.mark.parametrize("kind", ["mistral", "small", "llama3", "smollm2"])
def test_end_of_turn_is_trained(kind: str, processors: dict[str, CogVLMProcessor]) -> None:
    """TRL warns, and trains a model that never stops, where this does not hold."""
    assert is_chat_template_stop_token_trained(processors[kind])
