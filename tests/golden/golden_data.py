"""Reads the recorded fixtures; `record.py` says what is in them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
RUNS = ("k1", "k3_whitened")


@functools.cache
def load(name: str) -> dict[str, Any]:
    """A fixture, as JSON gives it. Not to be written to."""
    return json.loads((HERE / name).read_text())


@dataclass(frozen=True)
class PpoRun:
    """One run of `trl_ppo.json`, with tensors for lists. B = 16 sequences, R = 8 response positions."""

    config: dict[str, Any]
    rollout: dict[str, Tensor]
    micro_batches: list[dict[str, Any]]
    whitening: list[dict[str, Any]]
    models: dict[str, Any] | None

    @property
    def lengths(self) -> Tensor:
        """[B] response lengths; TRL's `sequence_lengths` are indices of last tokens."""
        return self.rollout["sequence_lengths"] + 1

    @property
    def response_mask(self) -> Tensor:
        """[B, R], True on response tokens."""
        return ~self.rollout["padding_mask"]

    @property
    def mask_p1(self) -> Tensor:
        """[B, R], True on response tokens and one position more: where TRL's critic is trained and its GAE starts."""
        return ~self.rollout["padding_mask_p1"]

    @property
    def shorter(self) -> Tensor:
        """Rows whose response ends before position R."""
        return (self.lengths < self.response_mask.shape[1]).nonzero().squeeze(1)


@functools.cache
def ppo_run(name: str) -> PpoRun:
    """A run of `trl_ppo.json` by its name in `RUNS`."""
    run = load("trl_ppo.json")["runs"][name]
    return PpoRun(
        config=run["config"],
        rollout={k: torch.tensor(v) for k, v in run["rollout"].items()},
        micro_batches=[tensors(m) for m in run["micro_batches"]],
        whitening=[tensors(call) for call in run["whitening"]],
        models=run.get("models"),
    )


def tensors(record: dict[str, Any]) -> dict[str, Any]:
    """Lists as tensors, all else as it is."""
    return {k: torch.tensor(v) if isinstance(v, list) else v for k, v in record.items()}
