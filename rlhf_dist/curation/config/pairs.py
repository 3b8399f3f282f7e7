"""Configuration of `rlhf-dist data pairs`."""

from __future__ import annotations

from pydantic import Field

from rlhf_dist.config.base import NonNegative
from rlhf_dist.config.data import DataSource
from rlhf_dist.curation.config.base import CurationConfig


class PairsConfig(CurationConfig):
    """Preference pairs out of ratings and rankings, with the difference of the ratings as margin."""

    sources: tuple[DataSource, ...] = Field(min_length=1)
    """Kind `ratings` (prompt, response, rating; each response goes into one pair at most, drawn by the seed, whose ratings
    differ by the source's `min_margin`) or `preference` (a ranking of K responses gives up to K(K-1)/2 pairs)."""
    min_margin: NonNegative = 0.0
    """Of rankings with ratings: the least difference that makes a pair. Equal ratings never make one."""
