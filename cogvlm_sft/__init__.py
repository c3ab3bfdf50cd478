"""Supervised fine-tuning of CogVLM.

The public names are imported on first use, so that importing the package loads neither torch nor
transformers and `cogvlm-sft --help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogvlm_sft.conversation import (
        Conversation,
        Turn,
        read_conversations,
        write_conversations,
    )
    from cogvlm_sft.errors import (
        CheckpointError,
        CogVLMSFTError,
        DataError,
        ModelInputError,
        RecipeError,
        TrainingError,
    )
    from cogvlm_sft.model import CogVLMConfig, CogVLMForCausalLM, CogVLMProcessor
    from cogvlm_sft.recipe import Recipe, load_recipe
    from cogvlm_sft.training.run import TrainResult, train

_HOMES = {
    "CheckpointError": "cogvlm_sft.errors",
    "CogVLMConfig": "cogvlm_sft.model",
    "CogVLMForCausalLM": "cogvlm_sft.model",
    "CogVLMProcessor": "cogvlm_sft.model",
    "CogVLMSFTError": "cogvlm_sft.errors",
    "Conversation": "cogvlm_sft.conversation",
    "DataError": "cogvlm_sft.errors",
    "ModelInputError": "cogvlm_sft.errors",
    "Recipe": "cogvlm_sft.recipe",
    "RecipeError": "cogvlm_sft.errors",
    "TrainingError": "cogvlm_sft.errors",
    "TrainResult": "cogvlm_sft.training.run",
    "Turn": "cogvlm_sft.conversation",
    "load_recipe": "cogvlm_sft.recipe",
    "read_conversations": "cogvlm_sft.conversation",
    "train": "cogvlm_sft.training.run",
    "write_conversations": "cogvlm_sft.conversation",
}

__all__ = [
    "CheckpointError",
    "CogVLMConfig",
    "CogVLMForCausalLM",
    "CogVLMProcessor",
    "CogVLMSFTError",
    "Conversation",
    "DataError",
    "ModelInputError",
    "Recipe",
    "RecipeError",
    "TrainResult",
    "TrainingError",
    "Turn",
    "load_recipe",
    "read_conversations",
    "train",
    "write_conversations",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
