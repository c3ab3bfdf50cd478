"""Tokenizers of the three kinds that CogVLM meets, without a download.

`mistral` is a real 32,000-piece sentencepiece model of LLaMA's kind that a package carries; the
others are trained here in a second: a byte-fallback sentencepiece, and byte-level BPE with the
pre-tokenizers of Llama-3 and SmolLM2. The Llama-3 one has no pad token (EOS then stands on the
placeholders) and writes ".\\n" as one token.
"""

import io
import shutil
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cogvlm_sft.model import CogVLMImageProcessor, CogVLMProcessor

TEXTS = [
    "Question: What colour is the bus? Answer: The bus is white and red.\n",
    "Question: How many digits? Short answer: 3, 14 and 159.\nUSER: 你好 ASSISTANT: 你好。\n",
    "A chat between a curious user and an assistant. It is blue.\nIt is not!\nWhy?\n",
] * 20
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, bos: str, eos: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[bos, eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


def llama_kind(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = LlamaTokenizer.from_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers_by_kind(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, PreTrainedTokenizerBase]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("mistral", "small")}
    carried = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(carried, folders["mistral"] / "tokenizer.model")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.strip() for text in TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    (folders["small"] / "tokenizer.model").write_bytes(model.getvalue())
    llama3 = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    smollm = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return {
        **{name: llama_kind(folder) for name, folder in folders.items()},
        "llama3": byte_level(llama3, "<|begin_of_text|>", "<|end_of_text|>"),
        "smollm2": byte_level(smollm, "<|im_start|>", "<|im_end|>"),
    }


@pytest.fixture(scope="session")
def processors(
    tokenizers_by_kind: dict[str, PreTrainedTokenizerBase],
) -> dict[str, CogVLMProcessor]:
    """One processor a tokenizer; a picture of 28 px takes 6 tokens."""
    return {
        name: CogVLMProcessor(CogVLMImageProcessor(size=28), tokenizer)
        for name, tokenizer in tokenizers_by_kind.items()
    }


@pytest.fixture(scope="session")
def processor(processors: dict[str, CogVLMProcessor]) -> CogVLMProcessor:
    return processors["mistral"]
