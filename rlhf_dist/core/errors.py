"""The exceptions a user can meet.

Every message gives the value, the constraint and the remedy. The command line prints the message
alone (no traceback) and exits with the class's `exit_code`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class RlhfDistError(Exception):
    """Base of every error that is the user's to fix."""

    exit_code = 1


class ConfigError(RlhfDistError):
    """A configuration value, key or combination that cannot be run."""

    exit_code = 2


class DataError(RlhfDistError):
    """A data file, row or set that cannot be used; names the file and the line."""

    exit_code = 3


class TooLongError(DataError):
    """A record longer than `max_length_tokens` under `on_too_long: error`; `on_bad_row: skip` does not set it aside."""


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


class WorkerDied(WorkerError):  # noqa: N818 (what happened)
    """The process of a rank ended, or its node did; what the rank held is lost."""

    def __init__(self, message: str, role: str = "", rank: int = 0) -> None:
        """`role`, `rank`: whose process it was."""
        super().__init__(message)
        self.role = role
        self.rank = rank


class EngineError(WorkerDied):
    """The generation engine of a rank failed, such as by the death of a process of its own, and can be started again. Not for
    what a new engine would meet again, such as bad data. A worker raises it with a message; the driver adds role and rank."""


class TrainingError(RlhfDistError):
    """A training step that must not be taken (non-finite loss, stale weights in a rollout engine)."""

    exit_code = 8


class SubmissionError(RlhfDistError):
    """A cluster or scheduler that does not take a job."""

    exit_code = 9


class Preempted(RlhfDistError):  # noqa: N818 (nothing went wrong)
    """A run that was asked to stop, did so at the end of a step with a checkpoint, and is to be continued."""

    exit_code = 75
    """`EX_TEMPFAIL` of sysexits.h: nothing is wrong, try again later. Job scripts requeue on it."""


class SampleError(TrainingError):
    """A training step that must not be taken because of some of its samples, which the trainer writes down."""

    def __init__(self, message: str, rows: Mapping[str, Sequence[int]] | None = None, step: int | None = None) -> None:
        """`rows`: what they are rows of (a loss term's batch, the rollouts) → row numbers in it; `step`: which of an update's
        optimizer steps."""
        super().__init__(message)
        self.rows = {name: list(numbers) for name, numbers in (rows or {}).items()}
        self.step = step
