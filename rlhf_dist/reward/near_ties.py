"""The near-ties of a reward model's data: counted, left out where they are to be, and weighed."""

from __future__ import annotations

from dataclasses import replace

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.core.near_ties import NearTieRule
from rlhf_dist.data.datasets import PreferenceDataset, Split
from rlhf_dist.data.near_ties import NearTieCounts
from rlhf_dist.reward.config import NearTiesConfig


def tell_apart(
    config: NearTiesConfig, data: Split[PreferenceDataset]
) -> tuple[Split[PreferenceDataset], NearTieRule, dict[str, str]]:
    """(the data as they are trained on, the rule with its weights, what to say at the start).

    Raises:
        ConfigError: no record states a margin; or all pairs are near-ties and the treatment needs others.
    """
    counts = data.train.near_ties(config.below)
    key = "reward.near_ties"
    if counts.num_unrated == counts.num_near + counts.num_clear:
        raise ConfigError(
            f"{key} is set but no record of data.train states a margin, by which near-ties are told; give records a margin "
            "(pairs) or ratings (rankings), or set it to null"
        )
    if not counts.num_clear and config.treat in ("drop", "down_weight"):
        raise ConfigError(
            f"{key}.treat is {config.treat}, but all {counts.num_near} pairs of data.train have a margin below {key}.below "
            f"{config.below:g}, so none is left to train on or to weigh them against; lower {key}.below, or use soft_labels"
        )
    rule = NearTieRule.of(config.below, config.treat, counts.near_total, counts.clear_total)
    facts = {"training pairs": _in_words(counts, config.below)}
    if config.treat == "drop":
        left = len(data.train) - len(counts.with_clear)
        data = replace(data, train=data.train.keeping(counts.with_clear))
        facts["near-ties"] = f"left out, and with them {left} training records that have no other pair"
    elif config.treat == "down_weight":
        facts["near-ties"] = (
            f"weigh {rule.near_weight:.4g} each and clear pairs {rule.clear_weight:.4g}: in total "
            f"{rule.near_weight * counts.near_total:.6g} against {rule.clear_weight * counts.clear_total:.6g}"
        )
    else:
        facts["near-ties"] = {"keep": "weigh as much as clear pairs", "soft_labels": "have soft labels"}[config.treat]
    if data.eval is not None:
        facts["held-out pairs"] = _in_words(data.eval.near_ties(config.below), config.below)
    return data, rule, facts


def _in_words(counts: NearTieCounts, below: float) -> str:
    total = counts.num_near + counts.num_clear
    unrated = f", of which {counts.num_unrated:,} state no margin" if counts.num_unrated else ""
    return (
        f"{counts.num_near:,} of {total:,} near-ties (margin below {below:g}; {counts.num_near / total:.1%}), "
        f"{counts.num_clear:,} clear{unrated}"
    )
