"""METEOR 1.5, where Java and the authors' program are there.

METEOR aligns words through stems, WordNet's synonyms and a table of paraphrases, which its Java
program holds; the PyPI package pycocoevalcap carries it. Notable choice: the program is asked
for the counts of each picture only, and the arithmetic on them stands here, so that an interval by
resampling starts Java once and not a thousand times. A test holds both to what the program's own
scores are.
"""

import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cogvlm_sft.errors import DataError

# Counts of one picture, in the program's order: words of the caption and of the reference that it
# fits best, function words of both, then for each kind of match content words of both and function
# words of both, then chunks and matched words of both.
_COUNTS = 23
_KINDS = (1.0, 0.6, 0.8, 0.6)  # exact, stem, synonym, paraphrase
# The program's parameters for English.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75


def meteor_program() -> list[str]:
    """The command that starts METEOR.

    Raises:
        DataError: Java or pycocoevalcap is missing.
    """
    java = shutil.which("java")
    package = find_spec("pycocoevalcap")
    if java is None or package is None:
        missing = "Java" if java is None else "pip install 'cogvlm-sft[meteor]'"
        raise DataError(f"METEOR needs {missing}")
    for folder in package.submodule_search_locations or ():
        jar = Path(folder) / "meteor" / "meteor-1.5.jar"
        if jar.is_file():
            return [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(jar),
                    "-", "-", "-stdio", "-l", "en", "-norm"]  # fmt: skip
    raise DataError("METEOR needs meteor-1.5.jar, which this pycocoevalcap does not carry")


def meteor_counts(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> NDArray[np.int64]:
    """What METEOR needs of each picture; sums of rows go to `meteor`.

    Args:
        predictions: One tokenized caption a picture.
        references: All tokenized captions of each picture, at least one.

    Returns:
        (pictures, 23): see `_COUNTS`.

    Raises:
        DataError: Java or the program is missing, or it did not answer.
    """
    lines = [
        " ||| ".join(["SCORE", *group, " ".join(prediction.replace("|||", "").split())])
        for prediction, group in zip(predictions, references, strict=True)
    ]
    done = subprocess.run(
        meteor_program(),
        input="\n".join(lines) + "\n",
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    if done.returncode or len(rows) != len(lines) or any(len(row) != _COUNTS for row in rows):
        said = done.stderr.strip().splitlines()
        raise DataError(f"METEOR's program failed: {said[-1] if said else done.returncode}")
    return np.array(rows, dtype=np.float64).astype(np.int64).reshape(-1, _COUNTS)


def meteor(counts: NDArray[np.int64]) -> float:
    """METEOR of a set, 0 to 1, from the rows of `meteor_counts`."""
    # A caption that matches its reference from end to end in one piece is not fragmented at all.
    whole = (counts[:, 20] <= 1) & (counts[:, 21:] == counts[:, :2]).all(axis=1)
    total = counts.sum(axis=0).astype(np.float64)
    total[20] -= counts[whole, 20].sum()
    precision, recall = (_weighted(total, side) for side in (0, 1))
    if not precision or not recall:
        return 0.0
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    fragmentation = total[20] / total[21:].mean()
    return float(mean * (1 - _GAMMA * fragmentation**_BETA))


def _weighted(total: NDArray[np.float64], side: int) -> float:
    """Matched words over all words of the captions (0) or the references (1), weighted."""
    matches = sum(
        weight * (_DELTA * total[4 + 4 * kind + side] + (1 - _DELTA) * total[6 + 4 * kind + side])
        for kind, weight in enumerate(_KINDS)
    )
    function_words = total[2 + side]
    words = _DELTA * (total[side] - function_words) + (1 - _DELTA) * function_words
    return float(matches / words) if words else 0.0
