"""Figures that others printed, with where and how, to stand beside ours.

Only what could be read in a source is here; a figure from a single or second-hand source says so.
Figures of the two paper versions, of the README and of leaderboards differ by protocol and are
kept apart. The authors' evaluation prompts were never published (THUDM/CogVLM issues 76, 384).
"""

from cogvlm_sft.evaluation.tasks.task import Published

_NOTE = "CogVLM paper v2 (arXiv 2311.03079), through a third-party reading note"
_README = "README of THUDM/CogVLM"
_GENERALIST = "one model tuned on all data sets together; prompt not published"


def _one(figure: str, value: float, source: str, protocol: str, model: str = "CogVLM") -> Published:
    return Published(figure, value, model, source, protocol)


NOCAPS = (
    _one("CIDEr", 128.3, _NOTE, "validation, all domains; zero-shot, prompt not published"),
    _one("CIDEr, out-domain", 132.6, _NOTE, "validation; zero-shot, prompt not published"),
)
FLICKR30K = (_one("CIDEr", 94.9, _NOTE, "Karpathy test; zero-shot, prompt not published"),)
COCO = (_one("CIDEr", 148.7, _NOTE, "Karpathy test; fine-tuned on COCO"),)
TEXTCAPS = (_one("CIDEr", 144.9, _NOTE, "test server; fine-tuned, prompt not published"),)
VQAV2 = (
    _one("accuracy", 82.3, "wizwand.com, an aggregator", "test-dev; " + _GENERALIST),
    _one("accuracy", 84.7, "wizwand.com, an aggregator", "test-dev; fine-tuned (paper v1)"),
)
OKVQA = (
    _one("accuracy", 64.7, "radar chart of the README, read off the grid", "paper v1, fine-tuned"),
)
TEXTVQA = (
    _one("accuracy", 70.4, "an aggregator", _GENERALIST),
    _one("accuracy", 68.1, "THUDM/CogVLM issue 66", "validation; paper v1"),
    _one("accuracy", 69.7, "README of THUDM/CogVLM2", "validation"),
)
OCRVQA: tuple[Published, ...] = ()
GQA = (
    _one("accuracy", 65.0, "radar chart of the README, read off the grid", "paper v1, fine-tuned"),
)
VIZWIZ = (
    _one("accuracy", 75.7, "radar chart of the README, read off the grid", "paper v1, fine-tuned"),
)
SCIENCEQA = (
    _one("accuracy, with picture", 91.2, "an aggregator", _GENERALIST),
    _one("accuracy, with picture", 92.7, "radar chart of the README, read off the grid",
         "paper v1, fine-tuned"),
)  # fmt: skip
POPE = (
    _one("F1", 87.9, _NOTE, "mean of the three kinds; which metric is not said"),
    _one("F1, adversarial", 87.6, _README, "which metric is not said"),
)
MM_VET = (
    _one("score", 51.1, _NOTE, "graded by GPT-4 of 2023; beam search (issue 230)"),
    _one("score", 52.8, _README, "graded by GPT-4 of 2023; users reached 40.7 to 49.8 (issue 206)"),
)
LLAVA_BENCH = (_one("score", 77.8, _NOTE, "graded by GPT-4 of 2023"),)

_GROUNDING = "IoU > 0.5, boxes of an answer merged (issue 127)"
_V11 = "cogvlm-grounding-generalist-v1.1"


def _grounding(**values: float) -> tuple[Published, ...]:
    return tuple(
        _one(f"accuracy, {split}", value, _README, _GROUNDING, _V11)
        for split, value in values.items()
    )


REFCOCO = _grounding(val=92.76, testA=94.75, testB=88.99)
REFCOCO_PLUS = _grounding(val=88.68, testA=92.91, testB=83.39)
REFCOCOG = _grounding(val=89.75, test=90.79)
VISUAL7W = (_one("accuracy", 91.05, _README, "test; how a box was chosen is not said", _V11),)
