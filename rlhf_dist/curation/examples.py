"""Items of a data set that are worth reading: some drawn at random, and those at the ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_dist.core.random import permutation
from rlhf_dist.curation.config.inspect import InspectSettings
from rlhf_dist.curation.dataset_view import View, margin
from rlhf_dist.curation.text_quality import printable
from rlhf_dist.curation.token_spans import Piece, pieces, shortened

_ENOUGH = 100
"""Items of an order that are looked through for those not chosen yet."""


@dataclass(frozen=True)
class ShownSequence:
    """A sequence of an example."""

    label: str
    pieces: tuple[Piece, ...]
    num_tokens: int
    num_targets: int
    cut: bool = False
    rating: float | None = None


@dataclass(frozen=True)
class Example:
    """An item that is shown."""

    why: str
    """Why it was chosen."""
    location: str
    source: str
    task: str
    oddities: tuple[str, ...]
    sequences: tuple[ShownSequence, ...]
    margin: float | None = None


def draw_examples(
    view: View,
    tokenizer: PreTrainedTokenizerBase,
    settings: InspectSettings,
    seed: int,
    of_items: dict[int, tuple[str, ...]],
) -> Iterator[Example]:
    """Items drawn at random, then the extremes that are not among them.

    Args:
        view: the set.
        tokenizer: it was encoded with.
        settings: how many, and how much of each.
        seed: of the draw.
        of_items: the oddities of each item (of a text in several sequences, of the first).
    """
    chosen: dict[int, str] = {}
    for item in permutation(seed, f"inspect/{view.name}", 0, len(view))[: settings.num_examples].tolist():
        chosen[item] = "drawn at random"
    for why, order in _extremes(view, of_items):
        for item in [item for item in order if item not in chosen][: settings.num_extremes]:
            chosen[item] = why
    for item, why in chosen.items():
        sequences = tuple(
            ShownSequence(
                shown.label,
                tuple(shortened(pieces(tokenizer, shown.ids, shown.targets), settings.max_tokens_shown)),
                len(shown.ids),
                sum(shown.targets),
                shown.cut,
                shown.rating,
            )
            for shown in view.shown(item)
        )
        place, source, task = (printable(text) for text in (view.location(item), view.sources[item], view.task(item)))
        its = of_items.get(item, ())
        yield Example(why, place, source, task, its, sequences, margin(view.records[item]))


def _extremes(view: View, of_items: dict[int, tuple[str, ...]]) -> list[tuple[str, list[int]]]:
    """Reasons to look at an item, each with the items it concerns, the most extreme first."""
    frequency = Counter(name for names in of_items.values() for name in names)
    odd = {item: sum(1 / frequency[name] for name in names) for item, names in of_items.items() if names}
    characters = np.array([max(len(view.text(item)), 1) for item in of_items])
    density = view.tokens[list(of_items)] / characters
    items = list(of_items)
    reasons = [
        ("odd characters", sorted(odd, key=lambda item: -odd[item])),
        ("its response was cut", np.flatnonzero(view.cut).tolist()),
        ("among the longest", np.argsort(-view.lengths, kind="stable")[:_ENOUGH].tolist()),
        ("most tokens a character", [items[k] for k in np.argsort(-density, kind="stable")[:_ENOUGH].tolist()]),
    ]
    if view.kind != "prompts":
        reasons.append(("least to learn from", np.argsort(view.targets, kind="stable")[:_ENOUGH].tolist()))
    return reasons
