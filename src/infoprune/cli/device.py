"""Which device a process computes on."""

from __future__ import annotations

import os


def own_device(asked: str) -> str:
    """``asked``, but this process's own GPU where a launcher started several and ``cuda`` does not say which one.

    Launchers number the processes of a machine in ``LOCAL_RANK``; without it, all of them would load to the first GPU. A GPU that is
    named, such as ``cuda:1``, is taken as it is.
    """
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if asked == "cuda" and rank is not None else asked
