"""When a run's table of deviations may be published: when it is that of the whole suite."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from deviations import Case
from layouts import MAX_GRAD_NORM

SFT, RM, POLICY, _, VALUE = OBJECTIVES = tuple(MAX_GRAD_NORM)


Rows = Mapping[tuple[str, str], Collection[Case]]
"""(what varied, objective) → (ranks, ZeRO stage) of its cases."""


def is_whole(tests: Collection[str], outcomes: Mapping[str, str], deselected: Collection[str], measured: Rows) -> bool:
    """Whether no test was left out, none failed, and every row was measured in all its cases.

    `--last-failed` passes over files without deselecting their tests: only the rows tell then.
    """
    passed = all(outcomes.get(test) == "passed" for test in tests)
    return passed and not deselected and measured == expected_rows()


def expected_rows() -> dict[tuple[str, str], set[Case]]:
    """What all tests together measure."""
    cases: dict[str, tuple[tuple[str, ...], set[Case]]] = {
        "micro-batches of 1 and 8 rows": (OBJECTIVES, {(2, 2)}),
        "token budget": (OBJECTIVES, {(2, 3), (3, 2)}),
        "packed, not padded": (OBJECTIVES, {(1, 0), (2, 2), (3, 3)}),
        "inline": (OBJECTIVES, {(1, 2), (1, 3)}),
        "Ray against inline": (OBJECTIVES, {(1, 2), (1, 3)}),
        "tied embeddings, gradient checkpointing": ((SFT, POLICY), {(2, stage) for stage in range(4)}),
        "whole iteration": (("PPO policy", "PPO value"), {(1, 2), (2, 2), (3, 2), (3, 3)}),
        "whole iteration, token budget": (("PPO policy", "PPO value"), {(2, 3)}),
        "whole iteration, token budget, packed": (("PPO policy", "PPO value"), {(2, 2)}),
        "moving average of the weights": ((POLICY,), {(ranks, stage) for ranks in (2, 3) for stage in range(4)}),
        "update ended by early_stop_kl": ((POLICY,), {(ranks, stage) for ranks in (2, 3) for stage in range(4)}),
    }
    for stage in range(4):
        cases[f"ZeRO {stage}, number of ranks"] = (OBJECTIVES, {(ranks, stage) for ranks in (1, 2, 3)})
    return {(varied, objective): pairs for varied, (objectives, pairs) in cases.items() for objective in objectives}
