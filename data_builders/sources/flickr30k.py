"""Flickr30k captions: five sentences a picture, in Karpathy's `dataset_flickr30k.json`.

The file says which picture belongs to which split; the 1,014 of val and the 1,000 of test stay out
unless `splits` names them. (The original `results_20130124.token` has no splits and is not read.)

Usage:
    python -m data_builders.sources.flickr30k --annotations dataset_flickr30k.json \\
        --images flickr30k-images --out builds/flickr30k
"""

from data_builders.caption_sets import CaptionSource
from data_builders.source import File, Folder


class Flickr30k(CaptionSource):
    """See the module."""

    name = "flickr30k"
    title = "Flickr30k captions, Karpathy's split"
    license = "non-commercial research"
    commercial = False
    home = (
        "cs.stanford.edu/people/karpathy/deepimagesent (caption_datasets.zip); pictures on request"
    )
    files = (File("dataset_flickr30k.json", 0, "31,014 pictures; about 29,000 train"),)
    image_folders = (Folder("flickr30k-images", "on request from the authors; 31,783 pictures"),)


SOURCE = Flickr30k

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("flickr30k")
