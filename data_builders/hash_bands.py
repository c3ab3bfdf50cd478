"""Keys that near perceptual hashes share, so that only a few hashes are compared.

Two 64-bit hashes that differ in d bits at most agree wholly in one of d + 1 bands of neighbouring
bits (the pigeonhole principle): a table by band finds every pair that a comparison of all would.
"""

from itertools import pairwise


def bands(value: int, bits: int) -> list[tuple[int, int]]:
    """The bands of a hash, as (number of the band, its bits).

    Args:
        value: A 64-bit hash.
        bits: How many bits two hashes may differ in and still share a band.
    """
    edges = [64 * k // (bits + 1) for k in range(bits + 2)]
    return [
        (k, (value >> low) & ((1 << (high - low)) - 1))
        for k, (low, high) in enumerate(pairwise(edges))
    ]
