"""Mean and standard deviation of a reward model's scores, kept in a file beside its weights.

A reward model's level and scale are its own (a pair only says by how much its two scores differ). PPO can take them out:
InstructGPT and Stiennon et al. 2020 shift scores so that reference texts score 0 on average.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_dist.core.errors import ModelError

FILE = "score_moments.json"


@dataclass(frozen=True)
class ScoreMoments:
    """Of the scores of a set of responses."""

    mean: float
    std: float
    """Population standard deviation."""
    num_responses: int
    records: str
    """Which they were: `held-out` or `training`."""

    def to_json(self) -> str:
        """For `FILE`."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_score_moments(model_path: str) -> ScoreMoments:
    """What was saved with a model.

    Raises:
        ModelError: nothing was, or something that cannot be divided by.
    """
    path = Path(model_path).expanduser() / FILE
    remedy = "give a model/ folder of `rlhf-dist reward`, or set ppo.normalize_scores to std or mean_std"
    try:
        found = ScoreMoments(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ModelError(f"ppo.normalize_scores is saved, but {model_path} has no {FILE}; {remedy}") from error
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} cannot be read ({error}); {remedy}") from error
    if not (math.isfinite(found.mean) and math.isfinite(found.std) and found.std > 0):
        raise ModelError(f"{path} has mean {found.mean} and standard deviation {found.std}, to divide by; {remedy}")
    return found
