"""Training tokens are inference tokens plus the answer, whatever people write."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_sft.conversation import Conversation, Turn
from cogvlm_sft.data.encode import encode_conversation
from cogvlm_sft.model import CogVLMProcessor
from cogvlm_sft.model.processing_cogvlm import IGNORE_INDEX

KINDS = ["mistral", "small", "llama3", "smollm2"]

# Control tokens, sentencepiece's and byte-level BPE's signs for a space, a combined emoji.
PIECES = """
a|The bus|red|42|.|?|Answer:|[[012,999]]|你|好。|图片|😀|👩\u200d👧|é|e\u0301|</s>|▁|Ġ|<0x0A>
"""
pieces = st.sampled_from(
    [" ", "  ", "\n", "\t", "!\n", "<|end_of_text|>", *PIECES.strip().split("|")]
)
words = st.one_of(
    st.lists(pieces, min_size=1, max_size=6).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
)
# U+2581 is how sentencepiece writes a space, and at the ends of a text it is one: not doubled at
# the start, and one with the answer's own behind a bare question. Real spaces there are stripped.
words = words.filter(
    lambda text: (
        (bare := text.strip()) and "<image>" not in bare and "\u2581" not in (bare[0], bare[-1])
    )
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    style = draw(st.sampled_from(["chat", "vqa", "base", "text"]))
    rounds = draw(st.lists(st.tuples(words, words), min_size=1, max_size=4))
    pictured = draw(st.sampled_from(range(len(rounds)))) if style != "text" else None
    turns = []
    for index, (question, answer) in enumerate(rounds):
        mark = draw(st.sampled_from(["<image>\n", " <image> "])) if index == pictured else ""
        turns += [Turn("user", mark + question), Turn("assistant", answer)]
    images = () if pictured is None else ("picture.png",)
    return Conversation("one", "test", style, images, tuple(turns))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(conversation=conversations())
def test_every_turn(
    kind: str, processors: dict[str, CogVLMProcessor], conversation: Conversation
) -> None:
    processor = processors[kind]
    result = encode_conversation(conversation, processor)
    (row,) = result.parts
    rounds = [(question.content, answer.content) for question, answer in conversation.rounds()]
    eos = processor.tokenizer.eos_token_id
    expected = [IGNORE_INDEX] * len(row.input_ids)
    merged = 0
    for index, (question, answer) in enumerate(rounds):
        asked = [*(earlier for earlier, _ in rounds[:index]), question]
        prompt = processor.encode_prompt(
            question,
            history=rounds[:index],
            num_images=sum(text.count("<image>") for text in asked),
            style=conversation.style,
        )
        start = len(prompt["input_ids"])
        assert row.input_ids[:start] == prompt["input_ids"]
        assert row.token_type_ids[:start] == prompt["token_type_ids"]
        alone = processor.encode_answer(answer)
        stop = start + len(alone)
        if index == len(rounds) - 1:
            assert row.input_ids == prompt["input_ids"] + alone
        elif row.labels[start:stop] != alone:
            # The separator is merged into the answer's last token: no EOS, and the answer before
            # that token is learned as ever.
            merged += 1
            learned = row.labels[start : stop - 1]
            assert learned[:-1] == alone[:-2] or IGNORE_INDEX in row.labels[start:stop]
            assert eos not in learned
            expected[start:stop] = row.labels[start:stop]
            continue
        expected[start:stop] = alone
    assert row.labels == expected
    assert result.unsupervised_ends == merged
    assert sum(row.token_type_ids) == processor.num_image_tokens * len(conversation.images)
    assert eos not in [
        token
        for token, kind_of in zip(row.input_ids[:-1], row.token_type_ids[:-1], strict=True)
        if not kind_of
    ]


def released_prompt(style: str, question: str, history: list[tuple[str, str]]) -> str:
    """`_history_to_prompt` of the released code in our words, and Vicuna's prompt."""
    if style == "text":
        lines = [f"USER: {asked} ASSISTANT: {answer}\n" for asked, answer in history]
        return (
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions. "
            f"{''.join(lines)}USER: {question} ASSISTANT:"
        )
    if style == "base":
        return "".join(f"{asked} {answer}\n" for asked, answer in history) + question
    suffix = {"chat": "Answer:", "vqa": "Short answer:"}[style]
    lines = [f"Question: {asked} {suffix} {answer}\n" for asked, answer in history]
    return f"{''.join(lines)}Question: {question} {suffix}"


@settings(max_examples=100)
@given(
    style=st.sampled_from(["chat", "vqa", "base", "text"]),
    question=words.map(str.strip),
    history=st.lists(st.tuples(words.map(str.strip), words.map(str.strip)), max_size=3),
)
def test_prompts_are_the_released_ones(
    processors: dict[str, CogVLMProcessor],
    style: str,
    question: str,
    history: list[tuple[str, str]],
) -> None:
    """`encode_prompt` and the chat template both write the released model's prompt."""
    processor = processors["smollm2"]
    expected = released_prompt(style, question, history)
    row = processor.encode_rounds(question, history=history, num_images=0, style=style)
    assert processor.tokenizer.decode(row.input_ids[1:]) == expected
    messages = [
        {"role": role, "content": content}
        for asked in (*history, (question,))
        for role, content in zip(("user", "assistant"), asked, strict=False)
    ]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True, style=style)
    assert rendered == processor.tokenizer.bos_token + expected


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(conversation=conversations())
def test_messages_are_encoded_alike(
    kind: str, processors: dict[str, CogVLMProcessor], conversation: Conversation
) -> None:
    """`apply_chat_template`, which stock TRL calls, gives the tokens of our own encoding."""
    processor = processors[kind]
    # In a rendered text these are control tokens, as everywhere in transformers.
    special = processor.tokenizer.all_special_tokens
    if any(token in turn.content for turn in conversation.turns for token in special):
        return
    (row,) = encode_conversation(conversation, processor).parts
    output = processor.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in conversation.turns],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        style=conversation.style,
        processor_kwargs={"images": [_picture()]} if conversation.images else {},
    )
    assert output["input_ids"] == [row.input_ids]
    assert output["token_type_ids"] == [row.token_type_ids]
    masked = [
        token
        for token, mask in zip(output["input_ids"][0], output["assistant_masks"][0], strict=True)
        if mask
    ]
    last = processor.encode_answer(conversation.rounds()[-1][1].content)
    assert masked[-len(last) :] == last


def _picture() -> object:
    from PIL import Image

    return Image.new("RGB", (8, 8))
