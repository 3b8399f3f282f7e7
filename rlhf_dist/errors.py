"""The exceptions a user can meet.

Every message gives the value, the constraint and the remedy. The command line prints the message
alone (no traceback) and exits with the class's `exit_code`.
"""

from __future__ import annotations


class RlhfDistError(Exception):
    """Base of every error that is the user's to mend."""

    exit_code = 1


class ConfigError(RlhfDistError):
    """A configuration value, key or combination that cannot be run."""

    exit_code = 2


class DataError(RlhfDistError):
    """A data file, row or set that cannot be used; names the file and the line."""

    exit_code = 3


class ModelError(RlhfDistError):
    """A model or tokenizer directory that cannot be used."""

    exit_code = 4


class RunFolderError(RlhfDistError):
    """A run folder or checkpoint that may not be written or cannot be read."""

    exit_code = 5


class PlacementError(RlhfDistError):
    """The cluster cannot hold what the configuration asks for."""

    exit_code = 6


class WorkerError(RlhfDistError):
    """A hosted model raised an error or its process died; names the role and the rank."""

    exit_code = 7


class TrainingError(RlhfDistError):
    """A training step that must not be taken (non-finite loss, stale weights in a rollout engine)."""

    exit_code = 8
