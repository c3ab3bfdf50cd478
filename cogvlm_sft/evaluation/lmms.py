"""lmms-eval's tasks on our checkpoints, by an entry point: `--model cogvlm_sft`.

lmms-eval finds the model through the entry point `lmms_eval.models` of this package, so nothing has
to be registered by hand:

    lmms-eval --model cogvlm_sft --model_args checkpoint=runs/chat,style=vqa --tasks vqav2_val_lite

Notable choices: the task's own words go into the released prompt template (`style`), since a CogVLM
without its template answers badly whatever the harness; several pictures of one question stand
before it, numbered. Figures are lmms-eval's and follow its protocols: its RefCOCO takes IoU >= 0.5
and its POPE an exact yes or no, so they are not those of `cogvlm-sft evaluate`.
"""

from collections.abc import Sequence
from typing import Any, Literal

from PIL import Image
from tqdm import tqdm

from cogvlm_sft.checkpoint.load import load_processor
from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.generate import Request, generate_answers
from cogvlm_sft.evaluation.loading import open_model

try:
    from lmms_eval.api.model import lmms as _Base
except ImportError:
    _Base = object

_INSTALLED = _Base is not object
_MARKER = "<image>"


def manifest() -> Any:
    """What lmms-eval's registry wants to know."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("cogvlm_sft", simple_class_path=f"{__name__}.CogVLMSFT")


class CogVLMSFT(_Base):
    """A checkpoint as lmms-eval's model.

    Args:
        checkpoint: Checkpoint or adapter folder.
        style: Prompt template: `vqa` for short answers, `chat`, or `base`.
        batch_size: Questions generated at once.
        tokenizer: Tokenizer folder, where the checkpoint holds none.
        dtype, quantize: As in `open_model`.
        **ignored: `device` and `max_batch_size`, which lmms-eval hands to every model.

    Raises:
        DataError: lmms-eval is not installed.
        CheckpointError: The folder is missing or is not a whole checkpoint.
    """

    def __init__(
        self,
        checkpoint: str,
        style: str = "vqa",
        batch_size: int | str = 1,
        tokenizer: str | None = None,
        dtype: str | None = None,
        quantize: Literal["nf4"] | None = None,
        **ignored: Any,
    ) -> None:
        if not _INSTALLED:
            raise DataError("lmms-eval is not installed: pip install 'cogvlm-sft[eval]'")
        super().__init__()
        self.model = open_model(checkpoint, dtype=dtype, quantize=quantize)
        self.device = self.model.device  # lmms-eval's processes count their questions there
        self.processor = load_processor(checkpoint, tokenizer)
        self.style = style
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to lmms-eval's instances, in their order."""
        groups: dict[str, list[int]] = {}
        for index, instance in enumerate(requests):
            groups.setdefault(repr(instance.args[1]), []).append(index)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="cogvlm_sft", unit="question") as bar:
            for members in groups.values():
                options = dict(requests[members[0]].args[1])
                temperature = float(options.get("temperature") or 0)
                sampled = bool(options.get("do_sample")) and temperature > 0
                made = generate_answers(
                    self.model,
                    self.processor,
                    [self._request(*requests[index].args) for index in members],
                    batch_size=self.batch_size,
                    max_new_tokens=int(options.get("max_new_tokens", 128)),
                    num_beams=int(options.get("num_beams") or 1),
                    do_sample=sampled,
                    temperature=temperature if sampled else 1.0,
                    top_p=float(options.get("top_p") or 1.0) if sampled else 1.0,
                    on_batch=bar.update,
                )
                for index, text in zip(members, made, strict=True):
                    answers[index] = cut_at(text, options.get("until") or ())
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: the tasks of the paper generate."""
        raise DataError("this model answers generation tasks only, found a likelihood task")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise DataError("this model answers single-round tasks only, found a multi-round task")

    def _request(
        self, context: str, _: Any, to_visual: Any, document: Any, task: str, split: str
    ) -> Request:
        shown = to_visual(self.task_dict[task][split][document])
        pictures = shown if isinstance(shown, list) else [shown]
        for picture in pictures:
            if not isinstance(picture, Image.Image):
                raise DataError(
                    f"task {task} shows a {type(picture).__name__}; expected pictures only"
                )
        text = context.replace(_MARKER, "").strip()
        if len(pictures) > 1:
            numbered = [f"Picture {n}: {_MARKER}" for n in range(1, len(pictures) + 1)]
            text = " ".join([*numbered, text])
        return Request(tuple(pictures), text, self.style if pictures else "text")


def cut_at(text: str, until: str | Sequence[str]) -> str:
    """An answer up to the first of some strings; empty strings cut nothing."""
    for ending in [until] if isinstance(until, str) else until:
        if ending and ending in text:
            text = text[: text.index(ending)]
    return text.strip()
