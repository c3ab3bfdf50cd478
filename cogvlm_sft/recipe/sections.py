"""The sections of a training recipe, as typed models: every key, its type, default and meaning.

Keys are closed: an unknown one is an error. A value of the wrong type is an error too, never
converted ("8" is not 8). Paths are relative to the working directory. What a key does is said in
the docstring of its section, which `cogvlm-sft recipe keys` prints.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    field_validator,
    model_validator,
)

from cogvlm_sft.errors import RecipeError

RecipePath = Annotated[Path, Field(strict=False)]


class Section(BaseModel):
    """A closed, strictly typed part of a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class QuantizeSection(Section):
    """Linears held in 4 bits while they stay frozen (QLoRA, arXiv 2305.14314).

    The scales of the 64-weight blocks are quantised too, and products run in `model.dtype`.
    Embeddings, `lm_head`, the adapter and norms are never quantised.

    Attributes:
        type: 4-bit NormalFloat, the one type there is.
        groups: whose linears. The vision tower is not among them by default: its features suffer.
    """

    type: Literal["nf4"] = "nf4"
    groups: Annotated[
        list[Literal["language", "visual_expert", "vision_tower"]], Field(min_length=1)
    ] = ["language", "visual_expert"]


class ModelSection(Section):
    """Where the weights come from; exactly one of `checkpoint` and `config`.

    Attributes:
        checkpoint: folder in the released layout (config.json, *.safetensors).
        config: fields of CogVLMConfig, to start from scratch; the weights are drawn by train.seed.
        image_size: side of the pictures in pixels; null takes the checkpoint's own, another one
            interpolates the tower's position embedding, as between the paper's stages.
        tokenizer: tokenizer folder; null takes the checkpoint's own, which released ones lack.
        dtype: dtype of products and of frozen weights; what learns is held in float32 always.
        attention: one of transformers' implementations.
        quantize: `nf4` (or a mapping, see `QuantizeSection`) holds frozen linears in 4 bits.
    """

    checkpoint: RecipePath | None = None
    config: dict[str, Any] | None = None
    image_size: PositiveInt | None = None
    tokenizer: RecipePath | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    quantize: QuantizeSection | None = None

    @field_validator("quantize", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value


class Source(Section):
    """One conversation file or build folder, and how often it is seen.

    Attributes:
        path: a JSON Lines file of conversations, or a build folder.
        weight: 2.0 shows it twice in every pass, 0.3 a seeded 30 % of it.
    """

    path: RecipePath
    weight: PositiveFloat = 1.0


class DataSection(Section):
    """What is trained on, and how a conversation becomes labels.

    Attributes:
        train: sources; a weight of 2.0 shows one twice in every pass, 0.3 a seeded 30 % of it.
        validation: source of the held-out loss.
        image_root: folder that the image paths of the conversations are relative to.
        max_length: most tokens of a row; longer conversations are split at a turn or dropped.
        loss_on: `all` assistant turns, or the `last` only, as in the official code.
        workers: processes that read and decode ahead; 0 does it between the steps.
        share_images: compute a picture once for all conversations about it that stand in a step,
            which then come together; same loss, fewer tokens. micro_batch_size is then a mean.
        token_budget: with share_images, most tokens of a micro-batch.
        reduced_decode: decode JPEGs of more than twice the model's picture size at a half, a
            quarter or an eighth of their scale: faster, and pixels differ by about a grey level.
        length_window: so many steps are sorted by length together and dealt out again in parts, at
            most eight a step, so that the conversations of a micro-batch are alike; what a step
            holds depends on it and on the global batch only. 1 sorts within a step.
    """

    train: Annotated[list[Source], Field(min_length=1)]
    validation: RecipePath | None = None
    image_root: RecipePath
    max_length: PositiveInt | None = None
    loss_on: Literal["all", "last"] = "all"
    workers: Annotated[int, Field(ge=0)] = 0
    share_images: bool = False
    token_budget: PositiveInt | None = None
    reduced_decode: bool = False
    length_window: PositiveInt = 1


class GroupTuning(Section):
    """How a parameter group is treated.

    Attributes:
        mode: `frozen`; `full` to train every weight of it; or `lora` to train low-rank factors
            beside each of its linears, the rest of the group frozen.
        rate: multiple of train.learning_rate, 1 by default; not with mode `frozen`.
        rank: of the factors, with mode `lora` only, as are the keys below; 16 by default.
        alpha: scale of the factors' product, alpha / rank; twice the rank by default.
        dropout: on the factors' input; 0 by default.
        variant: `lora` (arXiv 2106.09685, the default), `rslora` (scale alpha / sqrt(rank), arXiv
            2312.03732), `dora` (with a learnt magnitude for each row, arXiv 2402.09353) or `pissa`
            (starts from the principal singular vectors, arXiv 2404.02948).
    """

    mode: Literal["frozen", "full", "lora"] = "full"
    rate: PositiveFloat | None = None
    rank: PositiveInt | None = None
    alpha: PositiveFloat | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    variant: Literal["lora", "rslora", "dora", "pissa"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_mode(cls, tree: Any) -> Any:
        """The defaults of the keys that a mode has are written out; others stay null."""
        if not isinstance(tree, dict):
            return tree
        given = {key: value for key, value in tree.items() if value is not None}
        if given.get("mode", "full") != "frozen":
            given.setdefault("rate", 1.0)
        if given.get("mode") != "lora":
            return given
        rank = given.get("rank", 16)
        alpha = 2 * rank if isinstance(rank, int) else None
        return {"rank": rank, "alpha": alpha, "dropout": 0.0, "variant": "lora", **given}


class TuneSection(Section):
    """The five parameter groups (`cogvlm_sft.tune.groups`)."""

    language: GroupTuning = GroupTuning()
    visual_expert: GroupTuning = GroupTuning()
    adapter: GroupTuning = GroupTuning()
    vision_tower: GroupTuning = GroupTuning()
    embeddings: GroupTuning = GroupTuning()

    def groups(self) -> dict[str, GroupTuning]:
        """Every group's treatment, in the order of the fields."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def trainable(self) -> dict[str, float]:
        """Rate of every group that learns, in the order of the fields."""
        return {
            name: group.rate
            for name, group in self.groups().items()
            if group.mode != "frozen" and group.rate is not None
        }

    def lora(self) -> dict[str, GroupTuning]:
        """The groups that learn by low-rank factors."""
        return {name: group for name, group in self.groups().items() if group.mode == "lora"}


class TrainSection(Section):
    """The optimisation and what is written while it runs.

    Attributes:
        output: folder of the run: logs, snapshots, and in the end the checkpoint.
        iterations: optimizer steps.
        global_batch_size: conversations of every step, over all processes.
        micro_batch_size: conversations that one process runs at once; does not change the result.
        optimizer: `adamw`; or `paged_adamw_8bit`, whose two moments are held in 8 bits (a quarter
            of the memory) and move to main memory when the GPU's is short.
        learning_rate: peak rate; the rates of `tune` multiply it.
        schedule: after the warm-up, `cosine` to zero or `constant`.
        warmup_iterations: steps of linear warm-up.
        weight_decay: AdamW's, on matrices only (see `cogvlm_sft.tune.groups`).
        betas: AdamW's two.
        epsilon: AdamW's.
        max_grad_norm: clipping of the gradient's norm; null for none.
        seed: of fresh weights and of the order of the data.
        save_every: steps between snapshots; the last step has one too.
        keep_snapshots: how many of the newest stay on the disk.
        resume: `auto` goes on from the newest complete snapshot in `output`; `never` refuses to.
        gradient_checkpointing: recompute layers in the backward pass: less memory, more time. `mlp`
            keeps what attention needs and recomputes the MLPs only.
        compile: let torch.compile make one kernel graph of the decoder layers (GPUs; the first
            steps take a minute).
        log_every: steps between figures.
        report_to: service that gets the figures besides `metrics.jsonl`.
    """

    output: RecipePath
    iterations: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt = 1
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    learning_rate: PositiveFloat
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_iterations: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: Annotated[
        list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)
    ] = [0.9, 0.95]
    epsilon: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat | None = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    save_every: PositiveInt = 500
    keep_snapshots: PositiveInt = 2
    resume: Literal["auto", "never"] = "auto"
    gradient_checkpointing: bool | Literal["mlp"] = False
    compile: bool = False
    log_every: PositiveInt = 10
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"


class Prompt(Section):
    """A question that is answered again and again while a run goes on.

    Attributes:
        question: its text, without a marker for the picture.
        image: path below data.image_root; null for a question about nothing but text.
        style: prompt template; null takes the checkpoint's own (`text` without a picture).
    """

    question: str
    image: str | None = None
    style: Literal["chat", "vqa", "base", "text"] | None = None


class EvaluateTask(Section):
    """A benchmark that the finished checkpoint is scored on, as `cogvlm-sft evaluate` does.

    Attributes:
        name: of the task; docs/evaluation.md lists them.
        annotations: its official files, or a build of held-out conversations.
        images: folder of the pictures; text tasks need none.
        limit: only the first so many questions.
    """

    name: str
    annotations: Annotated[list[RecipePath], Field(min_length=1)]
    images: RecipePath | None = None
    limit: PositiveInt | None = None


class EvaluateSection(Section):
    """What is looked at while training goes on; data.validation is measured at the end in any case.

    Attributes:
        every: steps between measurements of held-out loss and accuracy, and between generations;
            null where only tasks are given.
        batch_size: conversations at once.
        tasks: scored once, on the finished checkpoint; the report is `evaluation/report.html`.
        prompts: answered greedily every time; the answers go to `samples.jsonl`.
        max_new_tokens: longest answer to a prompt.
    """

    every: PositiveInt | None = None
    batch_size: PositiveInt = 8
    tasks: list[EvaluateTask] = []
    prompts: list[Prompt] = []
    max_new_tokens: PositiveInt = 64


class Recipe(Section):
    """A whole training run. `source` is the file or name it was loaded from, for messages."""

    model: ModelSection
    data: DataSection
    tune: TuneSection = TuneSection()
    train: TrainSection
    evaluate: EvaluateSection | None = None

    _source: str = PrivateAttr(default="recipe")

    @property
    def source(self) -> str:
        """File or packaged name that this recipe was loaded from."""
        return self._source

    @property
    def writes_adapter(self) -> bool:
        """Whether snapshots and result hold only what was trained, beside the base checkpoint.

        So it is with low-rank factors, and with 4-bit weights, which are not worth keeping.
        """
        return bool(self.tune.lora()) or self.model.quantize is not None

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; it loads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches a process runs per step, so that each step holds the global batch.

        Args:
            world_size: number of processes that train together.

        Raises:
            RecipeError: `global_batch_size` is not a multiple of `micro_batch_size` x world.
        """
        train = self.train
        together = train.micro_batch_size * world_size
        if train.global_batch_size % together:
            raise RecipeError(
                f"{self.source}: train.global_batch_size {train.global_batch_size} is not a "
                f"multiple of train.micro_batch_size {train.micro_batch_size} x {world_size} "
                f"process(es) = {together}; a step must hold exactly the global batch. Choose "
                f"a micro_batch_size that divides {train.global_batch_size} / processes."
            )
        return train.global_batch_size // together
