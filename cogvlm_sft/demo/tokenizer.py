"""The demo's tokenizer: a small byte-fallback sentencepiece BPE of LLaMA's kind.

It is trained on the demo's training texts and saved as `tokenizer.model` with the two JSON files
that transformers reads, with unk, bos, eos 0, 1, 2 and `<unk>` as the pad, as Vicuna has it.
Notable choices: the characters of signs are given to the trainer one by one, so that
no piece spans two and an unseen word is spelled; the coordinates of the grid, which come in threes
and often, become pieces of their own, so that a box is four choices and not twelve.
"""

import io
import json
import re
import string
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

VOCABULARY = 512
# Vicuna's, which is LLaMA's with a pad; `legacy` keeps the released model's handling of spaces.
_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "legacy": True,
    "model_max_length": 2048,
}


def train_tokenizer(texts: Iterable[str], out: Path, vocabulary: int = VOCABULARY) -> Path:
    """Trains and saves a tokenizer.

    Args:
        texts: Prompts and answers of the training split only.
        out: Folder that gets `tokenizer.model` and `tokenizer_config.json`.
        vocabulary: Pieces in all, the 3 special ones and 256 bytes included; fewer where the texts
            hold no more.

    Returns:
        The folder.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([spelled(text) for text in texts]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=False,
        character_coverage=1.0,
        required_chars=string.ascii_uppercase + string.digits,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(model.getvalue())
    (out / "tokenizer_config.json").write_text(json.dumps(_CONFIG, indent=2), encoding="utf-8")
    return out


def spelled(text: str) -> str:
    """The text without a sign's characters, which are required pieces: the trainer merges none.

    Not even with the space before them: a letter is the same piece in each place of a word.
    """
    return re.sub(r"\b[A-Z0-9]{1,2}\b", "", text)
