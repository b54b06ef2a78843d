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
