"""Typed records that cross module borders: batches of sequences (`records`), and optimiser steps over them (`steps`)."""

from rlhf_dist.batches.records import (
    FINISHED,
    TRUNCATED,
    Experience,
    PreferenceBatch,
    PromptBatch,
    RolloutBatch,
    SequenceBatch,
    TokenBatch,
    concat_rows,
    length_mask,
    pad_rows,
)
from rlhf_dist.batches.steps import (
    KL_STOP,
    NON_FINITE_GRADIENT,
    NON_FINITE_LOSS,
    StepReport,
    StepShare,
    TextShare,
    UpdateReport,
)

__all__ = [
    "FINISHED",
    "KL_STOP",
    "NON_FINITE_GRADIENT",
    "NON_FINITE_LOSS",
    "TRUNCATED",
    "Experience",
    "PreferenceBatch",
    "PromptBatch",
    "RolloutBatch",
    "SequenceBatch",
    "StepReport",
    "StepShare",
    "TextShare",
    "TokenBatch",
    "UpdateReport",
    "concat_rows",
    "length_mask",
    "pad_rows",
]
