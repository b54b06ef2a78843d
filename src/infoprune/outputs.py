"""Single files that a command writes when its work is done."""

from __future__ import annotations

import os
from pathlib import Path

from infoprune.errors import InfoPruneError


def check_file(path: Path, what: str) -> None:
    """Refuse a file that could not be written, before any work is done.

    Args:
        path: Where to.
        what: It is, for the message.

    Raises:
        InfoPruneError: It is a folder, or its folder is not there or can't be written to.
    """
    reason = None
    if not path.name or path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = "its folder does not exist"
    elif not os.access(path.parent, os.W_OK):
        reason = "its folder can't be written to"
    if reason is not None:
        raise InfoPruneError(f"Cannot write {what} to {path}: {reason}.")
