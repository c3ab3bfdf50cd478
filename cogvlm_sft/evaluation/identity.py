"""What a run of an evaluation is of: a restart goes on only for the same one."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogvlm_sft.checkpoint.adapter import base_of, is_adapter
from cogvlm_sft.evaluation.tasks.task import Question
from cogvlm_sft.model import CogVLMProcessor


def checkpoint_identity(checkpoint: Path | str | None) -> Any:
    """What tells one state of a checkpoint folder from another: weight files, an adapter's base."""
    if checkpoint is None:
        return None
    folder = Path(checkpoint)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])
    return [
        str(folder.resolve()),
        *([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files),
        *([checkpoint_identity(base_of(folder))] if is_adapter(folder) else []),
    ]


def tokenizer_identity(processor: CogVLMProcessor) -> str:
    """Its pieces with their numbers; it may lie elsewhere than the checkpoint."""
    pieces = sorted(processor.tokenizer.get_vocab().items())
    return hashlib.sha256(repr(pieces).encode()).hexdigest()


def questions_identity(questions: Sequence[Question]) -> str:
    """What is asked, in which order."""
    digest = hashlib.sha256()
    for question in questions:
        parts = (question.id, question.text, question.style, question.images, question.history)
        digest.update(repr(parts).encode())
    return digest.hexdigest()
