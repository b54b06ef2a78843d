"""The one exception family that users see; the CLI prints its message and exits with status 2."""

from __future__ import annotations


class InfoPruneError(Exception):
    """Something the user can mend. The message says what was wrong, where, and what to do."""


class UnsupportedModelError(InfoPruneError):
    """The model's family or one of its parts has no declaration."""


class BudgetError(InfoPruneError):
    """The budget cannot be met; the message says the smallest reachable value."""


class PlanError(InfoPruneError):
    """A plan is malformed, of another version, or does not fit the model."""


class CheckpointError(InfoPruneError):
    """A checkpoint is missing, incomplete or corrupt."""


class DataError(InfoPruneError):
    """A dataset is empty, unreadable or lacks a field."""


class CalibrationError(InfoPruneError):
    """Calibration met a value that is not finite or saw no tokens; the message names the site."""


class CertificateError(InfoPruneError):
    """A certificate can't be given: too little data for the bound asked for, or no plan on the path holds it; says what would do."""


def out_of_memory(error: BaseException) -> bool:
    """Whether a device's or the host's memory ran out, here or in what led here; by names and words, for code that needs no PyTorch."""
    found: BaseException | None = error
    while found is not None:
        if type(found).__name__ == "OutOfMemoryError" or isinstance(found, MemoryError) or "can't allocate memory" in str(found):
            return True
        found = found.__cause__
    return False
