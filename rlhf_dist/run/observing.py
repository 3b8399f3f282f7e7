"""Observability never ends a run: what only shows or records it may fail, with a warning."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

log = logging.getLogger(__name__)


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Inside, an error is a warning that `what` is missing."""
    try:
        yield
    except Exception as error:
        log.warning("%s: %s (%s); the run continues without", what, error, type(error).__name__)
