"""LLaVA-Instruct: 150k with its three parts, 80k, and the 1.5 mix of 665k with text-only rows.

Record: `{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}]}`; the picture marker
begins or ends the first question and is placed anew. Rows of the mix without an image become style
`text`. The mix does not name its parts, so `meta.subset` is read from the image path and from what
the first question asks for, and short-answer parts get the style `vqa`. Boxes of its RefCOCO and
Visual Genome parts stay as LLaVA wrote them, fractions of 1; drop those subsets to train on
CogVLM's boxes alone. Ids repeat (COCO ids), hence ids of our own. The 150k file is the three parts
shuffled and the mix holds the 150k: what is listed twice is dropped as `duplicate`. Pictures: COCO
train2017, found under their 2014 names too.

Usage:
    python -m data_builders.sources.llava_instruct --annotations llava_instruct_150k.json \\
        --images coco/train2017 --out builds/llava
"""

from collections import Counter
from typing import Any

from data_builders.clean import ROLES, dialogue
from data_builders.published import VISUAL_GENOME, File, Folder
from data_builders.source import Draft, Source

_SHORT_ANSWER = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
_REGION = ("short description for this region", "bounding box coordinate of the region")
# The mix's parts by the first folder of the picture: one for questions that ask for a short answer
# and one for others; its README gives 364,100 coco, 86,417 vg, 72,140 gqa, 80,000 ocr_vqa and
# 21,953 textvqa rows.
_FOLDERS = {
    "coco": ("vqav2_okvqa", "llava"), "vg": ("visual_genome", "visual_genome"),
    "gqa": ("gqa", "gqa"), "ocr_vqa": ("ocr_vqa", "ocr_vqa"), "textvqa": ("textcaps", "textcaps"),
}  # fmt: skip


class LlavaInstruct(Source):
    """See the module."""

    name = "llava_instruct"
    title = "LLaVA-Instruct-150K, its parts, 80K, and the LLaVA-1.5 mix of 665K"
    license = "CC-BY-4.0"
    home = "huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K; images.cocodataset.org/zips"
    # Sizes: the file list there; of the mix's pictures, huggingface.co/leonardPKU/llava1.5_data and
    # huggingface.co/datasets/weizhiwang/llava_v15_instruction_images.
    files = (
        File("llava_instruct_150k.json", 229_000_000, "157,712 records"),
        File("llava_instruct_80k.json", 131_000_000, "80,000 records, a subset of 150k"),
        File("conversation_58k.json", 126_000_000, "56,681 records, part of 150k"),
        File("detail_23k.json", 20_500_000, "23,240 records, part of 150k"),
        File("complex_reasoning_77k.json", 79_600_000, "76,643 records, part of 150k"),
        File("llava_v1_5_mix665k.json", 1_030_000_000, "665,298 records, holds 150k"),
    )
    image_folders = (
        Folder("coco/train2017", "train2017.zip, ~19.3 GB, 118,287 pictures; all that 150k needs"),
        Folder("gqa/images", "for the mix: images.zip, ~21.8 GB"),
        Folder("ocr_vqa/images", "for the mix: all saved as .jpg, mirrored as a zip of ~8.97 GB"),
        Folder("textvqa/train_images", "for the mix: train_val_images.zip, ~7.07 GB"),
        *VISUAL_GENOME,
    )

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one record; see `Source.draft`."""
        return llava_draft(record, notes, self.default_style, self.entry.style is None)


def llava_draft(record: Any, notes: Counter[str], style: str, infer: bool = True) -> Draft | str:
    """Understands a record of LLaVA's schema, which other sets share.

    Args:
        record: Any JSON value.
        notes: Repairs are counted here.
        style: Prompt style.
        infer: Whether rows that ask for a short answer become style `vqa`.
    """
    if type(record) is not dict:
        return "record_not_an_object"
    messages = record.get("conversations")
    turns = dialogue(messages, notes)
    if type(turns) is str:
        return turns
    images = record.get("image")
    names: list[Any] = images if type(images) is list else [images]
    if images is None or names in ([], [""]):
        names = []
    elif not all(type(name) is str for name in names):
        return "image_name_not_a_string"
    if len(names) > 1:  # CogVLM reads one picture
        return "several_images"
    problem = _check_markers(messages, len(names), notes)
    if problem:
        return problem
    assert isinstance(turns, list)
    identity = record.get("id")
    draft = Draft(turns, names, style, None if identity is None else str(identity))
    if infer and names and turns[0].endswith(_SHORT_ANSWER):
        draft.style = "vqa"
    if names and "/" in names[0]:
        subset = _subset(names[0].split("/", 1)[0], turns[0])
        if subset:
            draft.meta = {"subset": subset}
    return draft


def _subset(folder: str, question: str) -> str | None:
    """The part of the mix that a row comes from."""
    if folder not in _FOLDERS:
        return None
    if folder == "coco" and any(phrase in question for phrase in _REGION):
        return "refcoco"
    if folder == "coco" and question.endswith(_SHORT_ANSWER[1]):
        return "aokvqa"
    short, other = _FOLDERS[folder]
    return short if question.endswith(_SHORT_ANSWER[0]) else other


def _check_markers(messages: Any, images: int, notes: Counter[str]) -> str:
    """The reason to drop, if the markers contradict the pictures; repairs are counted."""
    markers = 0
    late = False
    for place, message in enumerate(messages):
        value = message.get("value", message.get("content"))
        role = message.get("from") or message.get("role")
        if type(value) is str and "<image>" in value and ROLES.get(role.strip().lower()) == 0:
            found = value.count("<image>")
            late = late or place > 0
            markers += found
    if markers == images == 1 and not late:
        return ""
    if not images:
        return "image_name_missing" if markers else ""
    notes["marker_added" if not markers else "marker_moved_or_merged"] += 1
    return ""


SOURCE = LlavaInstruct

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("llava_instruct")
