"""The processor's layout, its errors, and its behaviour as a transformers processor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerBase

from cogvlm_sft import CogVLMConfig, CogVLMProcessor, ModelInputError
from cogvlm_sft.model import CogVLMImageProcessor

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


def ids(processor: CogVLMProcessor, text: str) -> list[int]:
    encoded: list[int] = processor.tokenizer.encode(text, add_special_tokens=False)
    return encoded


def user(*parts: Any) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


@pytest.mark.parametrize("kind", ["mistral", "small", "llama3", "smollm2"])
def test_layout_is_the_released_models(kind: str, processors: dict[str, CogVLMProcessor]) -> None:
    processor = processors[kind]
    tokenizer = processor.tokenizer
    prompt = processor.encode_prompt("What colour?")
    picture = [tokenizer.pad_token_id] * 6
    text = ids(processor, "Question: What colour? Answer:")
    assert prompt["input_ids"] == [tokenizer.bos_token_id, *picture, *text]
    assert prompt["token_type_ids"] == [0, *[1] * 6, *[0] * len(text)]
    # Sentencepiece writes the answer's space itself, byte-level BPE must be given it.
    alone = "red" if kind in ("mistral", "small") else " red"
    assert processor.encode_answer("red") == [*ids(processor, alone), tokenizer.eos_token_id]


def test_types_do_not_come_from_the_ids(processors: dict[str, CogVLMProcessor]) -> None:
    """Here pad is EOS, so `ids == pad` would take the answer's end for a picture."""
    processor = processors["llama3"]
    assert processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id
    output = processor.apply_chat_template(
        [user(RED, "What?"), {"role": "assistant", "content": "red"}],
        tokenize=True,
        return_dict=True,
    )
    assert output["input_ids"][0][-1] == processor.tokenizer.pad_token_id
    assert output["token_type_ids"][0] == [0, *[1] * 6, *[0] * (len(output["input_ids"][0]) - 7)]


@pytest.mark.parametrize(
    "style, text",
    [
        ("chat", "Question: What? Answer:"),
        ("vqa", "Question: What? Short answer:"),
        ("base", "What?"),
    ],
)
def test_styles(processor: CogVLMProcessor, style: str, text: str) -> None:
    expected = [1, *[0] * 6, *ids(processor, text)]
    assert processor.encode_prompt("What?", style=style)["input_ids"] == expected
    assert processor(text="What?", images=RED, style=style)["input_ids"] == [expected]
    assert processor(text=f"<image>{text}", images=RED)["input_ids"] == [expected]
    message = [user(RED, "What?")]
    options = {"add_generation_prompt": True, "style": style}
    assert processor.apply_chat_template(message, **options) == f"<s><image>{text}"
    assert processor.apply_chat_template(message, tokenize=True, **options) == [expected]
    styled = CogVLMProcessor(processor.image_processor, processor.tokenizer, style=style)
    assert styled.encode_prompt("What?")["input_ids"] == expected
    assert styled.apply_chat_template(message, add_generation_prompt=True) == f"<s><image>{text}"


def test_rows_without_a_picture_get_vicunas_prompt(processor: CogVLMProcessor) -> None:
    rendered = processor.apply_chat_template([user("Hi.")], add_generation_prompt=True)
    assert rendered.startswith("<s>A chat between a curious user")
    assert rendered.endswith("USER: Hi. ASSISTANT:")
    row = processor.encode_prompt("Hi.", num_images=0)
    assert row["input_ids"] == [1, *ids(processor, rendered.removeprefix("<s>"))]
    assert "pixel_values" not in processor(text=rendered)


def test_the_picture_stands_before_its_round(processor: CogVLMProcessor) -> None:
    plain = processor.encode_prompt("What is this?")
    for question in ("<image>\nWhat is this?", "What is this? <image>", "What <image>\n is this?"):
        assert processor.encode_prompt(question) == plain
    later = processor.encode_prompt("<image> And this?", history=[("Hi.", "Hello.")])
    assert later["token_type_ids"].index(1) == 1 + len(
        ids(processor, "Question: Hi. Answer: Hello.")
    )


def test_several_pictures(processor: CogVLMProcessor) -> None:
    question = "Picture 1: <image> Picture 2: <image>\nWhich is red?"
    row = processor.encode_prompt(question, num_images=2)
    first, second, rest = (
        ids(processor, text)
        for text in ("Question: Picture 1:", "Picture 2:", "Which is red? Answer:")
    )
    assert row["input_ids"] == [1, *first, *[0] * 6, *second, *[0] * 6, *rest]
    assert sum(row["token_type_ids"]) == 12
    two_rounds = [user(RED, "A?"), {"role": "assistant", "content": "red"}, user(BLUE, "B?")]
    output = processor.apply_chat_template(
        two_rounds, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = processor.encode_prompt("<image>B?", history=[("<image>A?", "red")], num_images=2)
    assert output["input_ids"][0].tolist() == expected["input_ids"]
    assert output["pixel_values"].shape == (2, 3, 28, 28)
    assert output["pixel_values"][0, 0].mean() > output["pixel_values"][1, 0].mean()


@pytest.mark.parametrize("text", ["<image><image>Which?", "<image> \n <image> Which?"])
def test_adjacent_pictures_are_an_error(processor: CogVLMProcessor, text: str) -> None:
    with pytest.raises(ModelInputError, match="two images with nothing between"):
        processor(text=text, images=[RED, BLUE])
    with pytest.raises(ModelInputError, match="two images with nothing between"):
        processor.encode_prompt(text, num_images=2)
    with pytest.raises(ModelInputError, match="two images with nothing between"):
        processor.encode_prompt("Which?", num_images=2)
    with pytest.raises(ModelInputError, match="two images with nothing between"):
        processor.apply_chat_template(
            [user(RED, BLUE, "Which?")], add_generation_prompt=True, tokenize=True
        )


def test_counts_must_agree(processor: CogVLMProcessor) -> None:
    with pytest.raises(ModelInputError, match=r"2 <image> marker\(s\).*1 image"):
        processor(text="<image>a<image>", images=RED)
    with pytest.raises(ModelInputError, match=r"0 <image> marker\(s\).*1 image"):
        processor(text="What?", images=RED)
    with pytest.raises(ModelInputError, match=r"1 <image> marker\(s\).*0 image"):
        processor(text="<image>What?")
    with pytest.raises(ModelInputError, match=r"row 1: 1 <image> marker\(s\).*0 image"):
        processor(text=["<image>a", "<image>b"], images=[[RED], []])
    with pytest.raises(ModelInputError, match=r"2 <image> marker\(s\).*3 image"):
        processor(text=["<image>a", "<image>b"], images=[RED, BLUE, RED])
    with pytest.raises(ModelInputError, match=r"2 <image> marker\(s\).*1 image"):
        processor.encode_prompt("<image>a <image>")
    with pytest.raises(ModelInputError, match="answer of the history holds <image>"):
        processor.encode_prompt("b", history=[("a", "<image>")], num_images=1)
    with pytest.raises(ModelInputError, match="'text' takes no image, found 1"):
        processor.encode_prompt("a", style="text")


def test_batches_are_padded_left_for_generation(processor: CogVLMProcessor) -> None:
    texts = ["<image>Question: What colour is it? Answer:", "No picture.", "<image>Hi"]
    output = processor(text=texts, images=[RED, BLUE], return_tensors="pt")
    single = [processor(text=texts[1]), processor(text=texts[2], images=BLUE)]
    for index, alone in zip((1, 2), single, strict=True):
        width = len(alone["input_ids"][0])
        assert output["input_ids"][index, -width:].tolist() == alone["input_ids"][0]
        assert output["token_type_ids"][index, -width:].tolist() == alone["token_type_ids"][0]
        assert output["attention_mask"][index].sum() == width
        assert output["attention_mask"][index, -width:].all()
        assert not output["token_type_ids"][index, :-width].any()
    assert output["pixel_values"].shape[0] == 2
    right = processor(text=texts, images=[RED, BLUE], return_tensors="pt", padding_side="right")
    assert right["attention_mask"][:, 0].all()
    wide = processor(text=texts, images=[RED, BLUE], return_tensors="pt", pad_to_multiple_of=16)
    assert wide["input_ids"].shape[1] % 16 == 0
    rows = [
        {"input_ids": alone["input_ids"][0], "token_type_ids": alone["token_type_ids"][0]}
        for alone in single
    ]
    padded = processor.pad(rows)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(padded[name], output[name][1:, -padded[name].shape[1] :])


def test_truncation_spares_pictures(processor: CogVLMProcessor) -> None:
    text = "<image>" + "word " * 20
    output = processor(text=text, images=RED, truncation=True, max_length=12)
    assert len(output["input_ids"][0]) == 12 and sum(output["token_type_ids"][0]) == 6
    with pytest.raises(ModelInputError, match=r"do not match: max_length is 5, .* token 7"):
        processor(text=text, images=RED, truncation=True, max_length=5)


def test_control_tokens_of_users_are_words(processor: CogVLMProcessor) -> None:
    prompt = processor.encode_prompt("Is </s> a tag? <s>")["input_ids"]
    assert processor.tokenizer.eos_token_id not in prompt and prompt.count(1) == 1
    assert processor.encode_answer("</s>").count(processor.tokenizer.eos_token_id) == 1


def test_assistant_masks_cover_answers_alone(processor: CogVLMProcessor) -> None:
    conversation = [
        user(RED, "What 😀?"),
        {"role": "assistant", "content": "It is 红色."},
        user("And?"),
        {"role": "assistant", "content": [{"type": "text", "text": "It is blue."}]},
    ]
    other = [user("Hi."), {"role": "assistant", "content": "Hello."}]
    output = processor.apply_chat_template(
        [conversation, other],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    learned = [
        processor.tokenizer.decode(row[mask == 1])
        for row, mask in zip(output["input_ids"], output["assistant_masks"], strict=True)
    ]
    assert learned == ["It is 红色. It is blue.</s>", "Hello.</s>"]


def test_system_messages_are_refused(processor: CogVLMProcessor) -> None:
    messages = [{"role": "system", "content": "Be kind."}, user("Hi.")]
    with pytest.raises(ModelInputError, match="no 'system' message"):
        processor.apply_chat_template(messages)
    with pytest.raises(ModelInputError, match="style is 'poem', expected chat"):
        processor.apply_chat_template([user("Hi.")], style="poem")
    with pytest.raises(ModelInputError, match="style is 'poem', expected one of chat, vqa"):
        processor.encode_prompt("Hi.", style="poem")


@pytest.mark.parametrize("kind", ["mistral", "llama3"])
def test_round_trip(kind: str, processors: dict[str, CogVLMProcessor], tmp_path: Path) -> None:
    source = processors[kind]
    original = CogVLMProcessor(source.image_processor, source.tokenizer, style="vqa")
    original.save_pretrained(tmp_path)
    CogVLMConfig().save_pretrained(tmp_path)
    message = [user(RED, "What 你好?")]
    expected = original.apply_chat_template(message, add_generation_prompt=True, tokenize=True)
    for loaded in (
        CogVLMProcessor.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    ):
        assert isinstance(loaded, CogVLMProcessor)
        assert loaded.style == "vqa" and loaded.num_image_tokens == 6
        assert loaded.encode_prompt("What 你好?") == original.encode_prompt("What 你好?")
        assert loaded.encode_answer("你好.") == original.encode_answer("你好.")
        assert (
            loaded.apply_chat_template(message, add_generation_prompt=True, tokenize=True)
            == expected
        )
        assert loaded.tokenizer.pad_token_id == original.tokenizer.pad_token_id
    assert CogVLMProcessor.from_pretrained(tmp_path, style="base").style == "base"


def test_tokenizers_that_cannot_serve(
    tokenizers_by_kind: dict[str, PreTrainedTokenizerBase],
) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers_by_kind["smollm2"].backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    with pytest.raises(ModelInputError, match=r"no BOS token; .* set tokenizer.bos_token"):
        CogVLMProcessor(CogVLMImageProcessor(size=28), tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    assert CogVLMProcessor(CogVLMImageProcessor(size=28), tokenizer).encode_prompt("Hi.")
    with pytest.raises(ModelInputError, match="style is 'poem'"):
        CogVLMProcessor(CogVLMImageProcessor(size=28), tokenizer, style="poem")
