"""NoCaps: ten captions a picture of things that COCO has no captions for; for evaluation only.

The set has no training split: `nocaps_val_4500_captions.json` is its validation part, so every
record is held out unless `splits: [val]` asks for a build to evaluate on. `meta.domain` is `in-`,
`near-` or `out-domain`, by which results are reported.

Usage:
    python -m data_builders.sources.nocaps --annotations nocaps_val_4500_captions.json \\
        --images nocaps/images --splits val --out builds/nocaps_val
"""

from pathlib import Path
from typing import Any

from data_builders.caption_sets import CaptionSource
from data_builders.published import File, Folder
from data_builders.splits import Split, split_of_file


class Nocaps(CaptionSource):
    """See the module."""

    name = "nocaps"
    title = "NoCaps validation, for evaluation"
    license = "CC-BY"
    home = "nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json; nocaps.org/download"
    files = (File("nocaps_val_4500_captions.json", 0, "4,500 pictures, 45,000 captions; held out"),)
    image_folders = (
        Folder(
            "nocaps/images", "the pictures of each coco_url, saved by file_name; size not published"
        ),
    )

    def split(self, path: Path) -> Split:
        """Validation, whatever the file is called, except for the test part."""
        return "test" if split_of_file(path.name) == "test" else "val"

    def facts(self, picture: dict[str, Any]) -> dict[str, Any]:
        """How far the picture is from COCO."""
        domain = picture.get("domain")
        return {"domain": domain} if isinstance(domain, str) else {}


SOURCE = Nocaps

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("nocaps")
