"""Answers to fixed prompts while a run goes on: what a loss curve does not show.

Every process generates the same answers greedily, so that a sharded model stays in step and the
random state of the run is not touched; the first process writes them. One line of `samples.jsonl`
is one time of asking.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cogvlm_sft.conversation import resolve_image
from cogvlm_sft.data.pictures import check_picture
from cogvlm_sft.errors import ModelInputError, RecipeError
from cogvlm_sft.evaluation.generate import Request, generate_answers
from cogvlm_sft.model import CogVLMProcessor
from cogvlm_sft.recipe import EvaluateSection, Prompt
from cogvlm_sft.training.telemetry import drop_rows_after


class PromptSamples(TrainerCallback):
    """Answers a recipe's `evaluate.prompts` every `evaluate.every` steps and at the last one."""

    def __init__(
        self, path: Path, processor: CogVLMProcessor, image_root: Path, section: EvaluateSection
    ) -> None:
        """`path` is the file that gets a line each time."""
        self.path, self.processor, self.section = path, processor, section
        self.requests = prompt_requests(section.prompts, image_root)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A resumed run drops what was answered after the snapshot it goes on from."""
        if state.is_world_process_zero:
            drop_rows_after(self.path, state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Ask where it is time."""
        step = state.global_step
        if step % self.section.every and step < state.max_steps:
            return
        with (
            torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16),
            torch.compiler.set_stance("force_eager"),
        ):
            answers = generate_answers(
                model,
                self.processor,
                self.requests,
                batch_size=self.section.batch_size,
                max_new_tokens=self.section.max_new_tokens,
            )
        if not state.is_world_process_zero:
            return
        rows = [
            {"question": prompt.question, "image": prompt.image, "answer": answer}
            for prompt, answer in zip(self.section.prompts, answers, strict=True)
        ]
        for row in rows:
            tqdm.write(f"step {step}: {row['question']} -> {row['answer']}")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "samples": rows}, ensure_ascii=False) + "\n")


def check_prompts(prompts: Sequence[Prompt], processor: CogVLMProcessor, image_root: Path) -> None:
    """Put every prompt into tokens now, and not when it is first asked, hours later.

    Raises:
        DataError: a picture is missing, damaged, or outside the image root.
        RecipeError: a prompt's markers, picture and style do not fit each other.
    """
    for number, request in enumerate(prompt_requests(prompts, image_root)):
        where = f"evaluate.prompts.{number}"
        for picture in request.images:
            check_picture(Path(str(picture)), where)
        try:
            processor.encode_prompt(
                request.question, num_images=len(request.images), style=request.style
            )
        except ModelInputError as error:
            raise RecipeError(f"{where}: {error}") from None


def prompt_requests(prompts: Sequence[Prompt], image_root: Path) -> list[Request]:
    """The questions as `generate_answers` takes them.

    Raises:
        DataError: a picture is missing or lies outside the image root.
    """
    return [
        Request(
            images=()
            if prompt.image is None
            else (resolve_image(image_root, prompt.image, f"evaluate.prompts.{number}"),),
            question=prompt.question,
            style=prompt.style,
        )
        for number, prompt in enumerate(prompts)
    ]
