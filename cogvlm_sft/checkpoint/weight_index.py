"""The index of a sharded checkpoint: which files its weights are in.

Read by hand, since `checkpoint inspect` answers before torch could be imported. An index is a file
from elsewhere that names files to open: names that lead out of the folder are refused.
"""

import json
from pathlib import Path

from cogvlm_sft.errors import CheckpointError

WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors spells them


def shard_names(index: Path) -> list[str]:
    """Names of the weight files, sorted; all of them are in the index's own folder.

    Raises:
        CheckpointError: it is no index, or names a file elsewhere.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        strange = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of weights: {error!r}") from None
    if strange:
        raise CheckpointError(
            f"{index}: names {strange[0]!r}, expected plain names of files beside it"
        )
    return names
