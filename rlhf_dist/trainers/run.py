"""A run as its trainer sees it: the seed, where metrics and samples go, and the progress on the terminal."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_dist.config import RunConfig
from rlhf_dist.tracking.console import Console
from rlhf_dist.tracking.run_folder import RunFolder
from rlhf_dist.tracking.trackers import Tracker


class Run:
    """Facade over run folder, trackers and console."""

    def __init__(self, config: RunConfig, folder: RunFolder, tracker: Tracker, console: Console) -> None:
        self.seed = config.seed
        self.num_samples = config.tracking.num_samples
        self.folder = folder
        self._tracker = tracker
        self._console = console
