"""The commands that train or evaluate, by name: what checks a configuration, and what runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_dist.evaluation import build as evaluation
from rlhf_dist.ppo import build as ppo
from rlhf_dist.reward import build as reward
from rlhf_dist.run.launch import check_run_folder, resumable_step
from rlhf_dist.run.prepared import Prepared
from rlhf_dist.run.run_summary import print_shares
from rlhf_dist.sft import build as sft


@dataclass(frozen=True)
class Command:
    """A room's two entries."""

    prepare: Callable[[Any], Prepared[Any]]
    """Configuration → everything that can be checked and computed without starting an actor."""
    run: Callable[..., dict[str, Any]]
    """(configuration, session, prepared) → summary."""


COMMANDS = {
    "sft": Command(sft.prepare, sft.run_sft),
    "reward": Command(reward.prepare, reward.run_reward),
    "ppo": Command(ppo.prepare, ppo.run_ppo),
    "eval": Command(evaluation.prepare, evaluation.run_eval),
}


def validate(command: str, config: Any) -> dict[str, Any]:
    """Everything that can be checked without starting an actor; prints the shares of what is trained on, and returns the run
    summary.

    Raises:
        RlhfDistError: what a run of this configuration would end with.
    """
    check_run_folder(config)
    prepared = COMMANDS[command].prepare(config)
    resumable_step(config, prepared)
    print_shares(prepared.shares)
    return prepared.run_summary
