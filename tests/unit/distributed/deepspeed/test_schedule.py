"""Learning rates as a function of the step."""

from __future__ import annotations

import pytest

from rlhf_dist.config.hosting import OptimizerConfig
from rlhf_dist.distributed.deepspeed.schedule import learning_rate_factor


def factors(num_steps: int, **settings) -> list[float]:
    config = OptimizerConfig(**settings)
    return [learning_rate_factor(step, num_steps, config) for step in range(num_steps + 1)]


def test_by_hand():
    assert factors(4, schedule="linear", warmup_fraction=0) == [1, 0.75, 0.5, 0.25, 0]
    assert factors(4, schedule="cosine", warmup_fraction=0) == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0])
    assert factors(4, schedule="constant", warmup_fraction=0.5) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])
    assert factors(6, schedule="linear", warmup_fraction=1 / 3) == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
def test_no_step_of_the_run_is_wasted_and_none_exceeds_the_peak(schedule: str, warmup: float, num_steps: int):
    run = factors(num_steps, schedule=schedule, warmup_fraction=warmup)[:-1]
    assert all(0 < factor <= 1 for factor in run)
    peak = run.index(max(run))
    assert run[: peak + 1] == sorted(run[: peak + 1])
    assert run[peak:] == sorted(run[peak:], reverse=True)


def test_steps_after_the_end_do_not_rise_again():
    config = OptimizerConfig(schedule="cosine", warmup_fraction=0)
    assert [learning_rate_factor(step, 4, config) for step in (4, 5, 8)] == pytest.approx([0, 0, 0])
