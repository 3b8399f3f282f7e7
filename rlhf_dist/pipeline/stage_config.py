"""What each stage's configuration comes to: the pipeline's defaults filled in, and paths in place of interpolations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf_dist.config.interpolation import Interpolation, parse_interpolation
from rlhf_dist.evaluation.config import EvalConfig
from rlhf_dist.pipeline.config import PipelineConfig
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.sft.config import SFTConfig

CONFIGS: dict[str, Any] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig, "eval": EvalConfig}

Locate = Callable[[Interpolation], Sequence[Path]]
"""Where what a reference names is: a model's folder, or the files of a set."""


def stage_config(pipeline: PipelineConfig, name: str, locate: Locate, folder: Path) -> Any:
    """What the stage's own command would be given, with every reference replaced by what `locate` says of it."""
    section = getattr(pipeline, name)
    own = section.model_dump(mode="json", exclude={"seed", "tracking", "checkpoint"})
    run: dict[str, Any] = {
        "run_dir": folder,
        "seed": pipeline.seed if section.seed is None else section.seed,
        "cluster": pipeline.cluster,
        "device": pipeline.device,
        "ray": pipeline.ray,
        "tracking": section.tracking or pipeline.tracking,
    }
    if name != "eval":
        run |= {"resume": "auto", "checkpoint": section.checkpoint or pipeline.checkpoint}
    return CONFIGS[name].model_validate(run | _located(own, locate))


def _located(tree: Any, locate: Locate) -> Any:
    """A source that refers to a set becomes a source for each of its files."""
    if isinstance(tree, list):
        items = [_sources(item, locate) for item in tree]
        return [item for group in items for item in group]
    if not isinstance(tree, dict):
        return tree
    out = {key: _located(value, locate) for key, value in tree.items()}
    found = parse_interpolation(out.get("model_path"))
    return out if found is None else out | {"model_path": str(locate(found)[0])}


def _sources(item: Any, locate: Locate) -> list[Any]:
    found = parse_interpolation(item.get("path")) if isinstance(item, dict) else None
    if found is None:
        return [_located(item, locate)]
    # A set of several files is one source, called as the set is.
    name = item.get("name") or found.output
    return [item | {"path": str(path), "name": name} for path in locate(found)]
