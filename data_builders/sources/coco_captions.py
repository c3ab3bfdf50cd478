"""COCO captions: five people's sentences a picture, each a conversation of its own.

Reads Karpathy's `dataset_coco.json`, whose `train` and `restval` (the part of val2014 that everyone
trains on, 113,287 pictures together) enter and whose 5,000 + 5,000 others are held out, or the
official `captions_train2014.json`. Captions without a picture and pictures without a caption are
dropped by name.

Usage:
    python -m data_builders.sources.coco_captions --annotations dataset_coco.json --images coco \\
        --out builds/coco_captions
"""

from data_builders.caption_sets import CaptionSource
from data_builders.published import COCO_TRAIN2014, COCO_VAL2014, File


class CocoCaptions(CaptionSource):
    """See the module."""

    name = "coco_captions"
    title = "COCO captions, Karpathy's split or the official one"
    license = "CC-BY-4.0"
    home = (
        "cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip; "
        "images.cocodataset.org/annotations/annotations_trainval2014.zip; "
        "images.cocodataset.org/zips"
    )
    # Sizes: file lists of huggingface.co/datasets/openflamingo/eval_benchmark (dataset_coco) and
    # of huggingface.co/oclmodels/vqav2 (captions).
    files = (
        File(
            "dataset_coco.json", 144_000_000, "123,287 pictures; train and restval enter, 113,287"
        ),
        File("captions_train2014.json", 66_800_000, "in annotations_trainval2014.zip"),
        File("captions_val2014.json", 32_400_000, "held out"),
    )
    image_folders = (COCO_TRAIN2014, COCO_VAL2014)


SOURCE = CocoCaptions

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("coco_captions")
