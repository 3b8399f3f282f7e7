"""Real roles over real ranks, many layouts one after the other.

A Ray session on a machine's own CPUs keeps its processes: the first role of two ranks starts two actors, every later one is
hosted by the same two. That makes a layout cost half a second rather than twenty.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from rlhf_dist.config.hosting import RayConfig
from rlhf_dist.distributed.group import WorkerGroup, WorkerSpec
from rlhf_dist.distributed.inline import InlineSession
from rlhf_dist.distributed.ray.session import RaySession


@dataclass(frozen=True)
class Layout:
    """How a model is hosted, sharded and split: all that may not change a result."""

    ranks: int = 2
    zero_stage: int = 2
    micro_batch_size: int = 2
    cluster: str = "ray"
    hosting: dict[str, Any] = field(default_factory=dict)
    """Further keys of a hosted model."""
    training: dict[str, Any] = field(default_factory=dict)
    """Further keys of a trained model."""

    def host(self, model_path: Path) -> dict[str, Any]:
        """Keys of any hosted model in a configuration; a frozen one is sharded where the trained ones' parameters are."""
        return {
            "model_path": str(model_path),
            "precision": "fp32",
            "num_ranks": self.ranks,
            "micro_batch_size": self.micro_batch_size,
            "zero_stage": 3 if self.zero_stage == 3 else 0,
            **self.hosting,
        }

    def trained(self, model_path: Path) -> dict[str, Any]:
        """Keys of a trained model, less its optimizer."""
        return self.host(model_path) | {"zero_stage": self.zero_stage} | self.training

    def __str__(self) -> str:
        rest = "".join(f" {key}={value}" for key, value in (self.hosting | self.training).items())
        return f"{self.cluster} ranks={self.ranks} zero={self.zero_stage} micro={self.micro_batch_size}{rest}"


class Bench:
    """Sessions of both hostings."""

    def __init__(self, logs_dir: Path, seed: int = 0) -> None:
        self.logs_dir = logs_dir
        self.seed = seed
        self._sessions: dict[str, Any] = {"inline": InlineSession("cpu"), "ray": RaySession(RayConfig(), "cpu")}

    @contextlib.contextmanager
    def hosted(self, spec: WorkerSpec, layout: Layout) -> Iterator[WorkerGroup]:
        """The spec's worker, hosted as the layout says."""
        session = self._sessions[layout.cluster]
        with session.place([spec], seed=self.seed, logs_dir=lambda: self.logs_dir) as groups:
            yield groups[spec.role]

    def close(self) -> None:
        """Stop the actors."""
        for session in self._sessions.values():
            session.close()


def saved_weights(role: Any) -> dict[str, Tensor]:
    """The whole parameters of a trained role, by name: what `save` writes to model/."""
    with tempfile.TemporaryDirectory() as folder:
        role.save(Path(folder)).result()
        return read_weights(Path(folder) / "model")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Name → tensor of a model folder."""
    return {name: t.clone() for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
