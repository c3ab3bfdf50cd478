"""The conversations of a run, read and encoded by its first process only.

Checking every record and opening every picture takes a while, and from every GPU's process it would
be that often as much work for one shared disk. The first process writes what it found, an index of
rows, beside the run's logs; the others wait for it, and a run that goes on starts from it. While it
reads, it touches a file: where it died or met a bad record, its launcher ends the processes of its
own machine, but those of the others would wait for ever. A key names what the index was made of:
the data's digests, the settings of encoding, the tokenizer. The index of other ones is made anew.
"""

import contextlib
import hashlib
import json
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from cogvlm_sft import launch
from cogvlm_sft.conversation import conversation_files
from cogvlm_sft.data.mixture import ConversationDataset
from cogvlm_sft.errors import CheckpointError, DataError, TrainingError
from cogvlm_sft.model import CogVLMProcessor
from cogvlm_sft.recipe import Recipe
from cogvlm_sft.training.provenance import data_digests

_PREFIX = "rows-"
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_SIGNS = 5.0
# Without a sign of life; shared file systems show what another machine wrote up to a minute late.
_PATIENCE_SECONDS = 300.0


def dataset_of(
    recipe: Recipe,
    processor: CogVLMProcessor,
    name: str,
    sources: Sequence[tuple[Path, float]],
) -> ConversationDataset:
    """Conversations by a recipe's settings; every process calls this.

    Args:
        recipe: of the run.
        processor: encodes them.
        name: of the index, one each for what is trained on and what is held out.
        sources: (file or build folder, weight) pairs.

    Raises:
        DataError: a record or picture is unusable, or this process sees other data than the first.
        CheckpointError: `train.output` cannot be written to.
        TrainingError: the first process is gone.
    """
    file = recipe.train.output / f"{_PREFIX}{name}.npz"
    key = _key(recipe, processor, sources)
    index = _read(file, key)
    if index is None and launch.rank() > 0:
        index = _wait_for(file, key)
    with _signs_of_life(file) if index is None else contextlib.nullcontext():
        dataset = ConversationDataset(
            sources=sources,
            processor=processor,
            image_root=recipe.data.image_root,
            max_length=recipe.data.max_length,
            loss_on=recipe.data.loss_on,
            seed=recipe.train.seed,
            reduced_decode=recipe.data.reduced_decode,
            index=index,
        )
        if index is None:
            _write(file, key, dataset.index)
    return dataset


def is_index(file: Path) -> bool:
    """Whether a file of a run's folder is an index, or one that is being written."""
    return file.name.startswith(_PREFIX)


def remove_indices(output: Path) -> None:
    """A finished run needs them no more."""
    for file in output.glob(f"{_PREFIX}*"):
        file.unlink()


def _key(
    recipe: Recipe, processor: CogVLMProcessor, sources: Sequence[tuple[Path, float]]
) -> np.ndarray:
    """SHA-256 over all that the index follows from, (32,) of uint8."""
    files = [file for path, _ in sources for file in conversation_files(path)]
    tokenizer = processor.tokenizer
    made_of = {
        "version": version("cogvlm-sft"),
        "sources": [(str(path), weight) for path, weight in sources],
        "digests": data_digests(recipe),
        "files": [(str(file), file.stat().st_size) for file in files],
        "root": str(recipe.data.image_root),
        "max_length": recipe.data.max_length,
        "loss_on": recipe.data.loss_on,
        "seed": recipe.train.seed,
        "processor": processor.to_json_string(),
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": str(tokenizer.special_tokens_map),
    }
    digest = hashlib.sha256(json.dumps(made_of, default=str).encode()).digest()
    return np.frombuffer(digest, dtype=np.uint8)


def _read(file: Path, key: np.ndarray) -> dict[str, np.ndarray] | None:
    """The index, if it is there, whole, and of this key."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            index = dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return index if np.array_equal(index.pop("key", None), key) else None


def _wait_for(file: Path, key: np.ndarray) -> dict[str, np.ndarray]:
    """The index that the first process writes.

    Raises:
        DataError: it was written of other data.
        TrainingError: that process has given no sign of life for a while.
    """
    before, sign, since = _stamp(file), -1, 0.0
    while True:
        if (seen := _stamp(_sign(file))) != sign:
            sign, since = seen, time.monotonic()
        if time.monotonic() - since > _PATIENCE_SECONDS:
            raise TrainingError(
                f"{file}: process 0, which reads the records, has given no sign of life for "
                f"{_PATIENCE_SECONDS / 60:g} minutes; what it printed last says why"
            )
        stamp = _stamp(file)
        if (index := _read(file, key)) is not None:
            return index
        if stamp != before:
            raise DataError(
                f"{file}: process {launch.rank()} finds other conversations, or another tokenizer, "
                "than process 0; expected one file system that all machines see"
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


@contextlib.contextmanager
def _signs_of_life(file: Path) -> Iterator[None]:
    """Touches a file beside the index as long as the block runs, where somebody waits for it."""
    if launch.world_size() == 1:
        yield
        return
    ended, sign = threading.Event(), _sign(file)

    def touch() -> None:
        with contextlib.suppress(OSError):  # whoever writes the index will say it
            sign.parent.mkdir(parents=True, exist_ok=True)
            sign.touch()

    def keep_touching() -> None:
        while not ended.wait(_SECONDS_BETWEEN_SIGNS):
            touch()

    touch()
    thread = threading.Thread(target=keep_touching, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        sign.unlink(missing_ok=True)


def _sign(file: Path) -> Path:
    return file.with_suffix(".alive")


def _stamp(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _write(file: Path, key: np.ndarray, index: Mapping[str, np.ndarray]) -> None:
    """Beside its place and renamed.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    beside = file.with_suffix(".writing")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, key=key, **index)
        beside.replace(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written: {error}") from None
