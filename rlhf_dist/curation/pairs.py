"""Preference pairs out of ratings (one number a response) and K-way rankings, with margins where the scale gives them.

`rlhf-dist reward` reads ratings and rankings as they are. Written out as pairs they can be looked at, filtered, mixed, split
and judged anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

from rlhf_dist.core.errors import DataError
from rlhf_dist.curation.judgements import response_record
from rlhf_dist.data.records import Preference


def ranked_pairs(
    preferences: Iterable[Preference], min_margin: float = 0.0, *, source: str = ""
) -> Iterator[dict[str, Any]]:
    """Records of kind `preference`, one for every two responses of a ranking of which one is the better.

    Args:
        preferences: pairs, rankings, and pairs made of ratings, as `data.reader.read_preferences` gives them.
        min_margin: where there are ratings, the least difference that makes a pair, in their units.
        source: the name of the set; written as `source` where it is not "".

    Yields:
        prompt, chosen, rejected, where there are ratings their difference as `margin`, and the place as provenance.

    Raises:
        DataError: continuations without a prompt, which a pair cannot be written without.
    """
    for preference in preferences:
        if not preference.prompt:
            raise DataError(
                f"{preference.location}: has no prompt, and a pair cannot be written without one; `rlhf-dist reward` takes "
                "such ratings as they are (kind: ratings), or map a prompt with fields"
            )
        for better, worse in combinations(range(len(preference.responses)), 2):
            if preference.ranks[better] == preference.ranks[worse]:
                continue
            record: dict[str, Any] = {
                "prompt": response_record(preference.prompt, "user"),
                "chosen": response_record(preference.responses[better], "assistant"),
                "rejected": response_record(preference.responses[worse], "assistant"),
            }
            if tools := preference.tools:
                record["tools"] = list(tools)
            if preference.ratings is not None:
                margin = preference.ratings[better] - preference.ratings[worse]
                if margin < min_margin:
                    continue
                record["margin"] = margin
            named = {"source": source} if source else {}
            yield record | named | {"provenance": {"location": preference.location}}
