"""Building a worker in the process that hosts it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import transformers

from rlhf_dist.distributed.deepspeed.process_group import RankContext, prepare_process


def announce_accelerator(device: str) -> None:
    """Tell DeepSpeed the device before a library imports it: else it looks for one, and warns that it found none."""
    os.environ.setdefault("DS_ACCELERATOR", device)


def build_worker(build: Callable[..., Any], context: RankContext) -> Any:
    """Set the process up for `context` and construct the worker."""
    prepare_process(context)
    _quiet()
    return build(context=context)


def _quiet() -> None:
    """Libraries' own progress bars and notices would tear the run's: a hosted model speaks through its results."""
    # DeepSpeed calls collectives by names that torch is about to retire, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
