"""Configuration of CogVLM, with the keys and the defaults of the released `cogvlm-chat-hf`.

One class describes both generations: `num_multi_query_heads`, present only in CogVLM2, switches on
everything that CogVLM2 changed (grouped-query attention, a bias on the vision expert's QKV, RoPE
base 500000, the stride-2 convolution behind the tower). Keys that the released files do not hold
(`rope_theta`, and `num_multi_query_heads` for the first generation) are written only when they are
set, because engines that serve CogVLM tell the generations apart by their presence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from cogvlm_sft.errors import CheckpointError

# Keys that other exports of CogVLM carry and that we derive from the rest.
_DERIVED_KEYS = ("num_key_value_heads", "num_image_tokens", "head_dim")

# What the released CogVLM2 is told by, and what its config.json leaves to its Python code.
_LLAMA3_VOCABULARY, _LLAMA3_HEADS = 128256, 8

# What the released config.json holds about the tower.
_VISION_KEYS = (
    "dropout_prob", "hidden_act", "hidden_size", "image_size", "in_channels", "intermediate_size",
    "layer_norm_eps", "num_heads", "num_hidden_layers", "num_positions", "patch_size",
)  # fmt: skip


_COUNTS = (
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "vocab_size",
)  # fmt: skip
_VISION_COUNTS = (
    "hidden_size", "image_size", "in_channels", "intermediate_size", "num_heads",
    "num_hidden_layers", "num_positions", "patch_size",
)  # fmt: skip


def _check_values(config: Any, where: str, counts: tuple[str, ...], positive: str) -> None:
    """Whole numbers from 1, a number above 0, and an activation that transformers has."""
    for name in counts:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{where}: {name} is {value!r}, expected a whole number from 1")
    value = getattr(config, positive)
    if type(value) not in (int, float) or not value > 0:
        raise CheckpointError(f"{where}: {positive} is {value!r}, expected a number above 0")
    if config.hidden_act not in ACT2FN:
        raise CheckpointError(
            f"{where}: hidden_act is {config.hidden_act!r}, which transformers does not have; "
            "released files say silu, and gelu of the tower"
        )


class CogVLMVisionConfig(PreTrainedConfig):
    """The EVA2-CLIP-E tower without its last layer.

    Attributes:
        dropout_prob: dropout behind the attention's output projection; 0.0 in every release.
        image_size: side of the square input in pixels.
        num_positions: `(image_size / patch_size) ** 2 + 1`; the one more is the class token.

    Raises:
        CheckpointError: the sizes contradict each other.
    """

    model_type = "cogvlm_vision"
    base_config_key = "vision_config"

    dropout_prob: float = 0.0
    hidden_act: str = "gelu"
    hidden_size: int = 1792
    image_size: int = 490
    in_channels: int = 3
    intermediate_size: int = 15360
    layer_norm_eps: float = 1e-6
    num_heads: int = 16
    num_hidden_layers: int = 63
    num_positions: int = 1226
    patch_size: int = 14

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check_values(self, "vision_config", _VISION_COUNTS, "layer_norm_eps")
        if self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"vision_config: hidden_size {self.hidden_size} is not a multiple of num_heads "
                f"{self.num_heads}; expected one, fix config.json or the recipe's model.config"
            )
        if self.image_size % self.patch_size:
            raise CheckpointError(
                f"vision_config: image_size {self.image_size} is not a multiple of patch_size "
                f"{self.patch_size}; expected one, fix config.json or the recipe's model.config"
            )
        expected = self.grid**2 + 1
        if self.num_positions != expected:
            raise CheckpointError(
                f"vision_config: num_positions is {self.num_positions}, but an image of "
                f"{self.image_size} px in patches of {self.patch_size} px has {expected} "
                "(patches + 1); fix config.json or the recipe's model.config"
            )

    def keys(self) -> tuple[str, ...]:
        """The released keys: with `__getitem__` it reads like the mapping that engines expect."""
        return _VISION_KEYS

    def __getitem__(self, key: str) -> Any:
        """A field by name, as in `vision_config["image_size"]` of LMDeploy and others."""
        if key not in _VISION_KEYS:
            raise KeyError(key)
        return getattr(self, key)

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size


class CogVLMConfig(PreTrainedConfig):
    """CogVLM-17B by default; any Llama-shaped language model with a visual expert by its fields.

    Attributes:
        template_version: prompt style the weights were trained with: "chat", "base" or "vqa".
        num_multi_query_heads: key/value heads of CogVLM2 (8 at full size). A CogVLM does not have
            the attribute, as in the released classes: engines ask for it with a default.
        rope_theta: base of the rotary embedding; None means 10000, or 500000 for CogVLM2, as the
            released code has them hard-coded.

    Raises:
        CheckpointError: the sizes contradict each other, or RoPE scaling is asked for.
    """

    model_type = "cogvlm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    if TYPE_CHECKING:
        num_multi_query_heads: int
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    # The released class says 1e-6 and every released config.json 1e-5: the files are what ran.
    rms_norm_eps: float = 1e-5
    rope_theta: float | None = None
    template_version: str = "chat"
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    # Given as a mapping or left out, it becomes the typed configuration below.
    vision_config: CogVLMVisionConfig = None  # type: ignore[assignment]

    def __post_init__(self, **kwargs: Any) -> None:
        derived = {key: kwargs.pop(key) for key in _DERIVED_KEYS if key in kwargs}
        # Folders with remote code name their Python files here. We run none and drop the map,
        # except where this file is itself read as the remote code of an export.
        if not __name__.startswith("transformers_modules."):
            kwargs.pop("auto_map", None)
        for key in ("rope_scaling", "rope_parameters"):
            scaling = kwargs.pop(key, None) or {}
            kind = scaling.get("rope_type", scaling.get("type", "default"))
            if kind != "default":
                raise CheckpointError(
                    f"config: {key} asks for {kind!r} RoPE; CogVLM has plain RoPE only "
                    "(set rope_theta, or start from a base model without RoPE scaling)"
                )
            if self.rope_theta is None and "rope_theta" in scaling:
                self.rope_theta = scaling["rope_theta"]
        heads = kwargs.pop("num_multi_query_heads", None)
        shared = derived.get("num_key_value_heads")
        if heads is None and shared not in (None, self.num_attention_heads):
            heads = shared
        if heads is not None:
            self.num_multi_query_heads = heads
        # The released config.json nests the tower without a model_type of its own.
        if isinstance(self.vision_config, dict):
            nested = {k: v for k, v in self.vision_config.items() if k != "model_type"}
            self.vision_config = CogVLMVisionConfig(**nested)
        elif self.vision_config is None:
            self.vision_config = CogVLMVisionConfig()
        super().__post_init__(**kwargs)
        self._check_sizes(derived)

    def _check_sizes(self, derived: dict[str, Any]) -> None:
        _check_values(self, "config", _COUNTS, "rms_norm_eps")
        if self.is_cogvlm2:
            _check_values(self, "config", ("num_multi_query_heads",), "rms_norm_eps")
        if self.rope_theta is not None:
            _check_values(self, "config", (), "rope_theta")
        if type(self.initializer_range) not in (int, float):
            raise CheckpointError(
                f"config: initializer_range is {self.initializer_range!r}, expected a number"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise CheckpointError(
                f"config: pad_token_id is {self.pad_token_id}, expected 0 to {self.vocab_size - 1} "
                "(vocab_size - 1)"
            )
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"config: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; expected one"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_multi_query_heads {self.num_key_value_heads}; expected one"
            )
        if self.is_cogvlm2 and self.vision_config.grid % 2:
            raise CheckpointError(
                f"vision_config: a grid of {self.vision_config.grid} patches a side cannot be "
                "halved by CogVLM2's stride-2 convolution; expected an even number"
            )
        tokens = derived.get("num_image_tokens")
        if tokens is not None and tokens != self.num_image_tokens:
            raise CheckpointError(
                f"config: num_image_tokens is {tokens}, but the vision_config makes "
                f"{self.num_image_tokens} (patches + boi + eoi)"
            )
        head_dim = derived.get("head_dim")
        if head_dim is not None and head_dim != self.hidden_size // self.num_attention_heads:
            raise CheckpointError(
                f"config: head_dim is {head_dim}; CogVLM has hidden_size / num_attention_heads = "
                f"{self.hidden_size // self.num_attention_heads} only"
            )

    @property
    def is_cogvlm2(self) -> bool:
        """Whether this is the second generation (see the module's docstring)."""
        return hasattr(self, "num_multi_query_heads")

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values in the language model."""
        return self.num_multi_query_heads if self.is_cogvlm2 else self.num_attention_heads

    @property
    def rope_base(self) -> float:
        """Base of the rotary embedding in use."""
        if self.rope_theta is not None:
            return float(self.rope_theta)
        return 500000.0 if self.is_cogvlm2 else 10000.0

    @property
    def num_image_tokens(self) -> int:
        """Tokens that one image takes: its patches between boi and eoi (1227 at 490 px)."""
        grid = self.vision_config.grid // (2 if self.is_cogvlm2 else 1)
        return grid**2 + 2

    def to_dict(self) -> dict[str, Any]:
        """The configuration as in config.json: an unset `rope_theta` stays out, as released."""
        output = super().to_dict()
        if output.get("rope_theta") is None:
            output.pop("rope_theta", None)
        return output

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads config.json; released files have no `model_type`, and some CogVLM2 "cogvlm2".

        The released CogVLM2's file does not name its key/value heads either: they are a default of
        the Python code beside it. It is told by Llama-3's vocabulary.
        """
        config, unused = super().get_config_dict(*args, **kwargs)
        told = {"num_multi_query_heads", "num_key_value_heads"} & config.keys()
        if config.get("vocab_size") == _LLAMA3_VOCABULARY and not told:
            config["num_multi_query_heads"] = _LLAMA3_HEADS
        if config.get("model_type", "") in ("", "cogvlm2"):
            config["model_type"] = cls.model_type
        return config, unused


__all__ = ["CogVLMConfig", "CogVLMVisionConfig"]
