"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_memory() -> None:
    """Collect garbage and return what is free to the system."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Make the C library return what is free; glibc otherwise keeps it, in pieces that later steps can't use."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)
