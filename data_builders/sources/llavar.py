"""LLaVAR: text-rich pictures from LAION, in files that also hold all of LLaVA-Instruct.

LLaVA's schema. The 16k and 20k files are LLaVA's 158k followed by 15,500 or 19,800 new records,
whose picture names begin with 1000 (twelve digits, like COCO's, whose numbers stay below a
million). Only the new ones are taken; rows about COCO pictures are LLaVA's and dropped by name, so
a build with both never counts them twice. Addresses of LAION are dead: the archive is the source of
the pictures. The set's evaluation pictures (REval, 50) belong under `decontaminate.against`.

Usage:
    python -m data_builders.sources.llavar --annotations llava_instruct_150k_llavar_16k.json \\
        --images llavar/finetune --out builds/llavar
"""

from collections import Counter
from typing import Any

from data_builders.images import picture_key
from data_builders.published import File, Folder
from data_builders.source import Draft, Source
from data_builders.sources.llava_instruct import llava_draft


class Llavar(Source):
    """See the module."""

    name = "llavar"
    title = "LLaVAR fine-tuning part (text-rich pictures)"
    license = "CC-BY-NC-4.0"
    commercial = False
    home = "huggingface.co/datasets/SALT-NLP/LLaVAR"
    # Sizes: the file list there.
    files = (
        File(
            "llava_instruct_150k_llavar_16k.json", 267_951_819, "LLaVA and 15,500 new", exact=True
        ),
        File(
            "llava_instruct_150k_llavar_20k.json", 272_031_548, "LLaVA and 19,800 new", exact=True
        ),
        File("finetune.zip", 603_000_000, "pictures"),
        File("REval.zip", 149_000_000, "50 pictures held out, for decontaminate"),
    )
    image_folders = (Folder("llavar/finetune", "finetune.zip"),)

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one record; see `Source.draft`."""
        if type(record) is dict:
            image = record.get("image")
            if type(image) is list and len(image) == 1:
                image = image[0]
            if type(image) is str and image and not _own(image):
                return "part_of_llava_instruct"
            if not image:  # neither LLaVA's 158k nor the new part has rows without a picture
                return "image_name_missing"
        return llava_draft(record, notes, self.default_style, infer=False)


def _own(image: str) -> bool:
    """Whether a picture is not LLaVA's, all of which have COCO numbers, below a million."""
    key = picture_key(image)
    return not (len(key) == 12 and key.isascii() and key.isdigit() and int(key) < 1_000_000)


SOURCE = Llavar

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("llavar")
