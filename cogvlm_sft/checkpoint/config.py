"""config.json in: every field known, of the right kind, and fitting the others.

Released files carry keys of the transformers that wrote them and no `model_type`; those are let
through. Any other field that CogVLM does not have is an error, because a misspelt one would be
ignored in silence.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from cogvlm_sft.checkpoint.adapter import base_of, is_adapter, trained_image_size
from cogvlm_sft.checkpoint.positions import with_image_size
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.model import CogVLMConfig, CogVLMVisionConfig

# Keys of config.json that are no field of ours: transformers' of other versions, and derived ones.
_WRITTEN_BY_OTHERS = {
    *PreTrainedConfig().to_dict(),
    *("auto_map", "torch_dtype", "transformers_version", "rope_scaling", "rope_parameters"),
    *("num_key_value_heads", "num_image_tokens", "head_dim", "model_type"),
}


def make_config(fields: Mapping[str, Any], where: str = "model.config") -> CogVLMConfig:
    """A configuration from its fields, unknown ones refused.

    Raises:
        CheckpointError: an unknown field, or sizes that contradict each other.
    """
    vision = fields.get("vision_config") or {}
    if not isinstance(vision, Mapping):
        raise CheckpointError(f"{where}.vision_config is {vision!r}, expected a mapping")
    _refuse_unknown(fields, where)
    _refuse_unknown(vision, f"{where}.vision_config", CogVLMVisionConfig())
    _refuse_tied(fields, where)
    try:
        return CogVLMConfig(**fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def load_config(folder: str | Path) -> CogVLMConfig:
    """The configuration of a checkpoint folder, or of an adapter's base as the adapter changed it.

    Raises:
        CheckpointError: no folder, no config.json, or one that is not a CogVLM's.
    """
    path = Path(folder)
    if is_adapter(path):
        config, size = load_config(base_of(path)), trained_image_size(path)
        return config if size is None else with_image_size(config, size)
    if not path.is_dir():
        raise CheckpointError(
            f"checkpoint folder {path} does not exist; expected a folder in the released layout "
            "(config.json and *.safetensors), given as a local path"
        )
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} holds no config.json, so it is not a checkpoint folder")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("vision_config"), dict):
        raise CheckpointError(
            f"{file}: no vision_config in it, so this is not a CogVLM "
            f"(architectures: {raw.get('architectures') if isinstance(raw, dict) else None})"
        )
    vision = raw["vision_config"]
    _refuse_unknown({k: v for k, v in raw.items() if k not in _WRITTEN_BY_OTHERS}, str(file))
    _refuse_unknown(
        {k: v for k, v in vision.items() if k not in _WRITTEN_BY_OTHERS},
        f"{file}: vision_config",
        CogVLMVisionConfig(),
    )
    _refuse_tied(raw, str(file))
    try:
        return CogVLMConfig.from_pretrained(path, local_files_only=True)
    except CheckpointError as error:  # which says "config", not of which file
        raise CheckpointError(f"{file}: {error}") from None
    except (AttributeError, TypeError, ValueError) as error:  # the first: a dtype torch lacks
        raise CheckpointError(f"{file}: {error}") from None


def _refuse_tied(fields: Mapping[str, Any], where: str) -> None:
    """Other readers of the checkpoint would take the embedding for the head that lies beside it."""
    if fields.get("tie_word_embeddings"):
        raise CheckpointError(
            f"{where}: tie_word_embeddings is true; the released layout has an output head of its "
            "own, so leave it out"
        )


def _refuse_unknown(
    fields: Mapping[str, Any], where: str, kind: PreTrainedConfig | None = None
) -> None:
    known = (kind or CogVLMConfig()).to_dict()
    if kind is None:
        known |= {"num_multi_query_heads": None, "rope_theta": None}
    for key, value in fields.items():
        if type(known.get(key)) is int and not isinstance(value, int | list):
            raise CheckpointError(f"{where}: {key} is {value!r}, expected a whole number")
        if key not in known and not key.startswith("_"):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise CheckpointError(
                f"{where}: unknown field {key!r}; did you mean {near[0]!r}? ({where} holds the "
                "fields of config.json)"
            )
