"""What the C library does with memory that was freed, for processes that free a lot at once.

glibc keeps freed blocks for later, up to 32 MiB each, in a pool per thread. Where the blocks are
decoded pictures or a model's matrices, the process then grows although it holds nothing: merging
2.3 GB peaked at 6.6 GB, and a page that had shown eighty pictures kept 470 MB.
"""

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h
_KEPT_BYTES = 1 << 20


def return_freed_memory() -> None:
    """From now on freed blocks of a mebibyte and more go back to the system at once.

    Holds for the whole process. On C libraries other than glibc nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
