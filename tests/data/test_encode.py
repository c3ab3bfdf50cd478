"""Labels, splitting and drops. That tokens equal inference's is held in tests/processor."""

import pytest

from cogvlm_sft import Conversation, DataError, Turn
from cogvlm_sft.data.encode import EncodedConversation, encode_conversation
from cogvlm_sft.model import CogVLMProcessor
from cogvlm_sft.model.processing_cogvlm import IGNORE_INDEX

ROUNDS = [("<image>\nWhat colour?", "It is red."), ("Sure?", "Yes, 是的."), ("Why?", "I see it.")]


def conversation(
    rounds: list[tuple[str, str]] = ROUNDS, train: tuple[bool, ...] = (), style: str = "chat"
) -> Conversation:
    flags = [*train, *[True] * (len(rounds) - len(train))]
    turns = []
    for (question, answer), flag in zip(rounds, flags, strict=True):
        turns += [Turn("user", question), Turn("assistant", answer, flag)]
    count = sum(question.count("<image>") for question, _ in rounds)
    images = tuple(f"{index}.png" for index in range(count))
    return Conversation("c1", "test", style, images, tuple(turns))


def learned(row: EncodedConversation, processor: CogVLMProcessor) -> list[str]:
    """The answers under loss, cut behind each EOS."""
    answers: list[list[int]] = [[]]
    for label in row.labels:
        if label != IGNORE_INDEX:
            answers[-1].append(label)
            if label == processor.tokenizer.eos_token_id:
                answers.append([])
    assert not answers.pop(), "an answer without EOS"
    return [processor.tokenizer.decode(answer) for answer in answers]


def test_every_answer_is_learned_and_ends(processor: CogVLMProcessor) -> None:
    result = encode_conversation(conversation(), processor)
    (row,) = result.parts
    assert learned(row, processor) == ["It is red.</s>", "Yes, 是的.</s>", "I see it.</s>"]
    assert row.supervised == sum(label != IGNORE_INDEX for label in row.labels)
    assert result.dropped_rounds == result.unsupervised_ends == 0
    # Behind an inner answer the input is the separator, not EOS.
    assert row.input_ids.count(2) == 1 and row.labels.count(2) == 3
    separators = [row.input_ids[i] for i, label in enumerate(row.labels) if label == 2][:-1]
    assert processor.tokenizer.convert_ids_to_tokens(separators) == ["<0x0A>"] * 2
    for kind, label in zip(row.token_type_ids, row.labels, strict=True):
        assert not kind or label == IGNORE_INDEX


def test_loss_on_the_last_answer_alone(processor: CogVLMProcessor) -> None:
    (row,) = encode_conversation(conversation(), processor, loss_on="last").parts
    assert learned(row, processor) == ["I see it.</s>"]
    (whole,) = encode_conversation(conversation(), processor).parts
    assert row.input_ids == whole.input_ids


def test_turns_that_are_not_to_be_learned(processor: CogVLMProcessor) -> None:
    (row,) = encode_conversation(conversation(train=(False, True)), processor).parts
    assert learned(row, processor) == ["Yes, 是的.</s>", "I see it.</s>"]
    (row,) = encode_conversation(conversation(train=(True, False, False)), processor).parts
    (first,) = encode_conversation(conversation(ROUNDS[:1]), processor).parts
    assert row == first
    with pytest.raises(DataError, match="c1: every answer has train: false"):
        encode_conversation(conversation(train=(False,) * 3), processor)


def test_a_question_without_an_answer_is_left_out(processor: CogVLMProcessor) -> None:
    open_end = Conversation(
        "c1", "test", "chat", ("0.png",), (*conversation(ROUNDS[:1]).turns, Turn("user", "So?"))
    )
    assert (
        encode_conversation(open_end, processor).parts
        == encode_conversation(conversation(ROUNDS[:1]), processor).parts
    )


def test_split_between_rounds(processor: CogVLMProcessor) -> None:
    (whole,) = encode_conversation(conversation(), processor).parts
    limit = len(whole.input_ids)
    assert encode_conversation(conversation(), processor, max_length=limit).parts == (whole,)
    result = encode_conversation(conversation(), processor, max_length=limit - 1)
    assert [learned(part, processor) for part in result.parts] == [
        ["It is red.</s>", "Yes, 是的.</s>"],
        ["I see it.</s>"],
    ]
    # The picture comes along, and a part is what the model sees when asked from there.
    second = result.parts[1]
    assert second.images == ("0.png",) and sum(second.token_type_ids) == 6
    prompt = processor.encode_prompt("Why?")["input_ids"]
    assert second.input_ids == prompt + processor.encode_answer("I see it.")
    assert result.dropped_rounds == 0


def test_a_round_over_the_length_is_dropped_not_cut(processor: CogVLMProcessor) -> None:
    long = [ROUNDS[0], ("Tell.", "word " * 60), ROUNDS[2]]
    result = encode_conversation(conversation(long), processor, max_length=30)
    assert [learned(part, processor) for part in result.parts] == [
        ["It is red.</s>"],
        ["I see it.</s>"],
    ]
    assert result.dropped_rounds == 1
    nothing = encode_conversation(conversation([("<image> Tell.", "word " * 60)]), processor, 30)
    assert nothing.parts == () and nothing.dropped_rounds == 1


@pytest.mark.parametrize("limit", range(9, 60))
def test_no_limit_is_ever_passed(processor: CogVLMProcessor, limit: int) -> None:
    rounds = [*ROUNDS, ("<image> And this?", "Blue."), ("Sure?", "Yes.")]
    result = encode_conversation(conversation(rounds, (True, False)), processor, limit)
    answers = []
    for part in result.parts:
        assert len(part.input_ids) <= limit
        assert sum(part.token_type_ids) == 6 * len(part.images)
        assert part.labels[-1] == part.input_ids[-1] == 2
        answers += learned(part, processor)
    everything = ["It is red.</s>", "I see it.</s>", "Blue.</s>", "Yes.</s>"]
    assert [answer for answer in everything if answer in answers] == answers
    # A part that goes on about the second picture carries that one, not the first.
    for part in result.parts:
        if learned(part, processor) == ["Yes.</s>"]:
            assert part.images == ("1.png",)


def test_no_room_for_a_picture(processor: CogVLMProcessor) -> None:
    with pytest.raises(DataError, match=r"max_length is 8, but one image takes 6 tokens"):
        encode_conversation(conversation(), processor, max_length=8)
    text = conversation([("Hi.", "Hello.")], style="text")
    assert encode_conversation(text, processor, max_length=8).dropped_rounds == 1


def test_style_text_has_vicunas_prompt(processor: CogVLMProcessor) -> None:
    (row,) = encode_conversation(conversation([("Hi.", "Hello.")], style="text"), processor).parts
    text = processor.tokenizer.decode(row.input_ids)
    assert text.startswith("<s> A chat between") or text.startswith("<s>A chat between")
    assert text.endswith("USER: Hi. ASSISTANT: Hello.</s>") and not any(row.token_type_ids)


def test_adjacent_pictures_name_the_conversation(processor: CogVLMProcessor) -> None:
    with pytest.raises(DataError, match="c1: two images with nothing between"):
        encode_conversation(conversation([("<image><image> Which?", "A.")]), processor)
