"""What a trainer will see of its data, in numbers and in examples.

    data = load_sft(config.data, tokenizer, config.seed, keep_records=True)
    view = View("training records", data.train, config.data.train, tokenizer)
    report = inspect_set(view, tokenizer, InspectSettings(), seed=0)
    report.numbers["duplicates"], report.examples

It looks at the very data sets that the trainers' loaders make, so nothing here can differ from training. Of texts everything is
looked at that the record says, before a tokenizer's normalization; of tokens, what the model is given.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.curation.candidates import shown_text
from rlhf_dist.curation.config.dedup import DedupSettings
from rlhf_dist.curation.config.inspect import InspectSettings
from rlhf_dist.curation.dataset_view import View, margin
from rlhf_dist.curation.dedup import find_duplicates
from rlhf_dist.curation.examples import Example, draw_examples
from rlhf_dist.curation.fingerprints import encoded, normalized
from rlhf_dist.curation.text_quality import MEANINGS, MOJIBAKE, count_oddities, looks_for_mojibake, printable, scripts
from rlhf_dist.data.bad_rows import BadRow
from rlhf_dist.data.special_tokens import special_pattern

MAX_LISTED = 20
"""Duplicates, tasks, places and bad rows that a report lists; the rest is only counted."""
NUM_BINS = 32
_NORMALIZED = DedupSettings().normalize
_QUOTED, _NUMBER = re.compile(r"'[^']*'|\"[^\"]*\""), re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class SetReport:
    """A data set, looked at."""

    name: str
    kind: str
    numbers: dict[str, Any]
    """JSON; what the keys say, with units."""
    examples: tuple[Example, ...]


def inspect_set(
    view: View, tokenizer: PreTrainedTokenizerBase, settings: InspectSettings, seed: int, max_length_tokens: int
) -> SetReport:
    """All numbers of a set, and its examples. `max_length_tokens`: where the loader cuts."""
    first = view.first_items()
    special = special_pattern(tokenizer)
    counts, found = count_oddities(((view.location(item), view.text(item)) for item in first), special)
    of_items = dict(zip(first, found, strict=True))
    report = view.dataset.report
    numbers: dict[str, Any] = {
        "records read": report.num_records,
        "records used": report.num_used,
        "records skipped": report.num_skipped,
        "first places skipped": [printable(place) for place in report.skipped],
        "bad rows": len(report.bad),
        "records with a cut response": report.num_truncated,
        "sequences": len(view),
        "tokens": int(view.tokens.sum()),
        "tokens learnt from" if view.kind == "sequences" else "tokens of responses": int(view.targets.sum()),
        "unknown tokens": _num_unknown(view, tokenizer),
        "lengths": length_numbers(view.lengths, max_length_tokens),
        "sources": _shares(view, view.sources),
        "tasks": _shares(view, [view.task(item) for item in range(len(view))]),
        "duplicates": duplicate_numbers(view, first, settings),
        "repeated prompts": _num_repeated(view.prompt(item) for item in first),
        "oddities": [
            {
                "oddity": name,
                "records": count.num_texts,
                "meaning": MEANINGS[name],
                "places": [{"location": printable(place), "excerpt": printable(text)} for place, text in count.places],
            }
            for name, count in counts.items()
        ],
        "scripts": script_numbers(view, first),
    }
    if not looks_for_mojibake():
        numbers["not looked for"] = f"{MOJIBAKE}: ftfy is not installed (pip install 'rlhf-dist[curation]')"
    if view.kind == "preferences":
        numbers["preferences"] = preference_numbers(view)
    return SetReport(view.name, view.kind, numbers, tuple(draw_examples(view, tokenizer, settings, seed, of_items)))


def length_numbers(lengths: np.ndarray, max_length_tokens: int) -> dict[str, Any]:
    """Of [items] tokens: moments, quantiles, a histogram of `NUM_BINS` or fewer bins of whole tokens."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(-(-(high - low + 1) // NUM_BINS), 1)
    edges = np.arange(low, high + width + 1, width)
    quantiles = {f"p{q}": int(np.quantile(lengths, q / 100, method="inverted_cdf")) for q in (5, 50, 95, 99)}
    return {
        "shortest": low,
        "mean": round(float(lengths.mean()), 2),
        **quantiles,
        "longest": high,
        "max_length_tokens": max_length_tokens,
        "at max_length_tokens": int((lengths >= max_length_tokens).sum()),
        "histogram": {"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()},
    }


def _shares(view: View, names: Sequence[str]) -> list[dict[str, Any]]:
    """Each name's items and tokens, the largest first; [] where there are no names."""
    if not any(names):
        return []
    which, of_item = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)
    items, tokens = np.bincount(of_item), np.bincount(of_item, weights=view.tokens)
    targets = np.bincount(of_item, weights=view.targets)
    return [
        {
            "name": printable(str(which[k])) or "(none)",
            "sequences": int(items[k]),
            "share": round(float(items[k] / items.sum()), 6),
            "tokens": int(tokens[k]),
            "share of tokens": round(float(tokens[k] / tokens.sum()), 6),
            "tokens learnt from": int(targets[k]),
            "mean tokens": round(float(tokens[k] / items[k]), 2),
        }
        for k in np.argsort(-items, kind="stable")
    ]


def duplicate_numbers(view: View, first: Sequence[int], settings: InspectSettings) -> dict[str, Any]:
    """Records whose text an earlier record has, or nearly has (as `data dedup` finds them, white space and case aside)."""
    near, note = settings.near, ""
    if near is not None and len(first) > settings.max_near:
        near = None
        note = f"near-duplicates are not looked for in more than max_near {settings.max_near:,} records; use data dedup"
    rows = ({"text": view.text(item)} for item in first)
    try:
        verdicts = find_duplicates(rows, DedupSettings(near=near), fields=("text",))
    except ConfigError as error:  # the extra is not installed
        near, note = None, str(error)
        rows = ({"text": view.text(item)} for item in first)
        verdicts = find_duplicates(rows, DedupSettings(near=None), fields=("text",))
    counts = verdicts.counts()
    removed = [(i, removal) for i in range(len(first)) if (removal := verdicts.removal(i)) is not None]
    return {
        "exact": counts["exact duplicate"],
        "near": counts["near-duplicate"] if near is not None else None,
        **({"note": note} if note else {}),
        "first": [
            {
                "location": printable(view.location(first[i])),
                "same as": printable(view.location(first[removal.of])),
                "reason": removal.reason,
                **({"similarity": round(removal.similarity, 4)} if removal.similarity is not None else {}),
                "text": printable(view.text(first[i])[:200]),
            }
            for i, removal in removed[:MAX_LISTED]
        ],
    }


def _digest(text: str) -> bytes:
    return hashlib.blake2b(encoded(normalized(text, _NORMALIZED)), digest_size=12).digest()


def _num_repeated(texts: Iterable[str]) -> int:
    """Texts that an earlier one equals, case and white space aside; empty ones do not count."""
    digests = [_digest(text) for text in texts if text]
    return len(digests) - len(set(digests))


def overlap_numbers(train: View, held_out: View) -> dict[str, Any]:
    """How much of what is held out is also trained on, case and white space aside: whole records, and prompts."""
    found: dict[str, Any] = {}
    for name, of in (("records", View.text), ("prompts", View.prompt)):
        seen = {_digest(text) for item in train.first_items() if (text := of(train, item))}
        again = [item for item in held_out.first_items() if (text := of(held_out, item)) and _digest(text) in seen]
        found[f"held-out {name} that are trained on"] = len(again)
        found[f"first {name}"] = [printable(held_out.location(item)) for item in again[:MAX_LISTED]]
    return found


def script_numbers(view: View, first: Sequence[int]) -> list[dict[str, Any]]:
    """Letters of each script, the most frequent first, and the records that are mostly in it."""
    letters: Counter[str] = Counter()
    records: Counter[str] = Counter()
    places: dict[str, list[str]] = {}
    for item in first:
        here = scripts(view.text(item))
        letters.update(here)
        main = here.most_common(1)[0][0] if here else "(no letters)"
        records[main] += 1
        if records[main] <= 3:
            places.setdefault(main, []).append(printable(view.location(item)))
    total = max(letters.total(), 1)
    return [
        {
            "script": name,
            "share of letters": round(letters[name] / total, 6),
            "records mostly in it": records[name],
            "first places": places.get(name, []),
        }
        for name in sorted({*letters, *records}, key=lambda name: (-letters[name], name))
    ]


def preference_numbers(view: View) -> dict[str, Any]:
    """Biases of pairs that a reward model would learn: length, repeated responses, pairs that contradict others."""
    first_of: dict[tuple[bytes, ...], str] = {}
    gaps: list[int] = []
    longer = equal = 0
    contradictions: list[str] = []
    margins = [stated for record in view.records if (stated := margin(record)) is not None]
    for item in range(len(view)):
        best, *_, worst = (sum(sequence.targets) for sequence in view.shown(item))
        gaps.append(best - worst)
        longer, equal = longer + (best > worst), equal + (best == worst)
        record = view.records[item]
        if len(record.responses) == 2:
            prompt, (a, b) = view.prompt(item), (shown_text(r[-1]) for r in record.responses)
            key = tuple(map(_digest, (prompt, a, b)))
            opposite = first_of.get((key[0], key[2], key[1]))
            if opposite is not None:
                contradictions.append(f"{printable(view.location(item))} against {opposite}")
            first_of.setdefault(key, printable(view.location(item)))
    found: dict[str, Any] = {
        "share of items whose best response is longer than the worst": round(longer / len(view), 4),
        "share of items whose best and worst are of one length": round(equal / len(view), 4),
        "mean tokens that the best response is longer by": round(float(np.mean(gaps)), 2),
        "pairs that another pair contradicts": len(contradictions),
        "first contradictions": contradictions[:MAX_LISTED],
        "items with margins": len(margins),
    }
    if margins:
        quantiles = np.quantile(margins, [0, 0.05, 0.5, 0.95, 1])
        found["margins"] = {
            name: round(float(q), 4) for name, q in zip(("least", "p5", "p50", "p95", "most"), quantiles, strict=True)
        }
    return found


def _num_unknown(view: View, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens for what the vocabulary lacks."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return 0
    return sum(sequence.ids.count(unknown) for item in range(len(view)) for sequence in view.shown(item))


def bad_row_kinds(rows: Sequence[BadRow]) -> list[dict[str, Any]]:
    """Bad rows by what is wrong with them, names and numbers aside; the most frequent first."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        what = re.sub(r"^.*?(:\d+|record \d+|row \d+)( \(template .*?\))?: ", "", row.reason, count=1)
        groups.setdefault(_NUMBER.sub("N", _QUOTED.sub("'…'", what)), []).append(printable(row.reason))
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [{"rows": len(reasons), "first": reasons[0]} for reasons in ordered[:MAX_LISTED]]
