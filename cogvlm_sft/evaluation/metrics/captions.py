"""Caption scores over a set of pictures: CIDEr-D, BLEU-1 to 4 and ROUGE-L.

They equal the COCO caption scorer (pycocoevalcap 1.2) on the same captions, which a test holds to
1e-9; its package needs a Java machine and 100 MB of jars, so the arithmetic stands here. CIDEr's
inverse document frequency comes from the references of the run: a figure on a part of a data set
does not compare with one on the whole, and a single picture always gives 0. METEOR is in
`meteor.py`. SPICE is not here: its parser is fetched at its first use; the prediction file is in
the format that pycocoevalcap reads.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cogvlm_sft.evaluation.metrics.ptb import ptb_tokens

_ORDERS = 4
_SIGMA = 6.0
_ROUGE_BETA = 1.2
# BLEU's guards against division by zero, as in the official scorer.
_TINY, _SMALL = 1e-15, 1e-9

Ngram = tuple[str, ...]


def tokenize(caption: str) -> str:
    """A caption as the official scorers compare it: tokens joined by spaces."""
    return " ".join(ptb_tokens(caption))


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """CIDEr-D of each picture; the set's CIDEr is the mean (papers print 100 times it).

    The length in the penalty counts bigrams, as in the official code.

    Args:
        predictions: One tokenized caption a picture.
        references: All tokenized captions of each picture, at least one.
    """
    cooked = [[_ngrams(reference) for reference in group] for group in references]
    frequency: Counter[Ngram] = Counter()
    for group in cooked:
        frequency.update({ngram for counts in group for ngram in counts})
    log_pictures = math.log(len(cooked)) if cooked else 0.0

    def weighted(counts: Counter[Ngram]) -> tuple[list[dict[Ngram, float]], list[float], int]:
        vectors: list[dict[Ngram, float]] = [{} for _ in range(_ORDERS)]
        for ngram, count in counts.items():
            idf = log_pictures - math.log(max(1.0, frequency[ngram]))
            vectors[len(ngram) - 1][ngram] = count * idf
        norms = [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]
        return vectors, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    scores = np.zeros(len(predictions))
    for index, (prediction, group) in enumerate(zip(predictions, cooked, strict=True)):
        vectors, norms, length = weighted(_ngrams(prediction))
        total = 0.0
        for counts in group:
            others, other_norms, other_length = weighted(counts)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
            for order in range(_ORDERS):
                shared = sum(
                    min(value, others[order].get(ngram, 0.0)) * others[order].get(ngram, 0.0)
                    for ngram, value in vectors[order].items()
                )
                if norms[order] and other_norms[order]:
                    shared /= norms[order] * other_norms[order]
                total += shared * penalty
        scores[index] = 10 * total / (_ORDERS * len(group))
    return scores


def bleu_counts(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> NDArray[np.int64]:
    """What BLEU needs of each picture; sums of rows go to `bleu`.

    Returns:
        (pictures, 10): prediction length, length of the closest reference (the shorter on a tie),
        then for n = 1 to 4 the n-grams of the prediction and those that a reference shares.
    """
    rows = np.zeros((len(predictions), 2 + 2 * _ORDERS), dtype=np.int64)
    for index, (prediction, group) in enumerate(zip(predictions, references, strict=True)):
        most: Counter[Ngram] = Counter()
        for reference in group:
            most |= _ngrams(reference)
        length = len(prediction.split())
        closest = min((abs(len(one.split()) - length), len(one.split())) for one in group)[1]
        rows[index, :2] = length, closest
        for ngram, count in _ngrams(prediction).items():
            rows[index, 2 + _ORDERS + len(ngram) - 1] += min(count, most[ngram])
        for order in range(_ORDERS):
            rows[index, 2 + order] = max(0, length - order)
    return rows


def bleu(counts: NDArray[np.int64]) -> list[float]:
    """BLEU-1 to BLEU-4 of a set, from the rows of `bleu_counts`."""
    total = counts.sum(axis=0)
    length, closest = float(total[0]), float(total[1])
    product, scores = 1.0, []
    for order in range(_ORDERS):
        product *= (total[2 + _ORDERS + order] + _TINY) / (total[2 + order] + _SMALL)
        scores.append(product ** (1 / (order + 1)))
    ratio = (length + _TINY) / (closest + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [score * brevity for score in scores]


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """ROUGE-L of each picture, best precision and best recall over the references.

    An empty caption counts as one empty word, as in the official code.
    """
    scores = np.zeros(len(predictions))
    for index, (prediction, group) in enumerate(zip(predictions, references, strict=True)):
        words = prediction.split(" ")
        precision = recall = 0.0
        for reference in group:
            others = reference.split(" ")
            common = _longest_common(words, others)
            precision = max(precision, common / len(words))
            recall = max(recall, common / len(others))
        if precision and recall:
            weight = _ROUGE_BETA**2
            scores[index] = (1 + weight) * precision * recall / (recall + weight * precision)
    return scores


def _ngrams(caption: str) -> Counter[Ngram]:
    words = caption.split()
    return Counter(
        tuple(words[start : start + size])
        for size in range(1, _ORDERS + 1)
        for start in range(len(words) - size + 1)
    )


def _longest_common(one: list[str], other: list[str]) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for column, candidate in enumerate(other, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == candidate else max(above, row[column - 1])
            diagonal = above
    return row[-1]
