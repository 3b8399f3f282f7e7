"""How the records of several sources are mixed: rates, whole numbers of records, and which records.

    rates        r_i, exact fractions that add up to 1                       (`mixing_rates`)
    composition  c_i records of source i in a mixture of N = Σ c_i records   (`compose`)
    sampler      position p of the endless mixture → source and record       (`MixtureSampler`)

Rates of examples-proportional and of temperature-scaled mixing are those of T5 (Raffel et al. 2020, section 3.5.2). Nothing
here is drawn as it goes: counts follow from the rates by rounding, and the rest is a function of seed and position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.config.mixing import MixingSettings
from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.core.random import permutation

Rates = tuple[Fraction, ...]


def proportional_rates(sizes: Sequence[int], cap: int | None = None) -> Rates:
    """r_i = min(n_i, K) / Σ_j min(n_j, K); without a cap K, n_i / Σ_j n_j."""
    counted = [size if cap is None else min(size, cap) for size in sizes]
    return tuple(Fraction(size, sum(counted)) for size in counted)


def temperature_rates(sizes: Sequence[int], temperature: float, cap: int | None = None) -> Rates:
    """r_i^(1/T) / Σ_j r_j^(1/T), where r are the proportional rates; exact for T = 1, else to float64."""
    if temperature == 1:
        return proportional_rates(sizes, cap)
    counted = [size if cap is None else min(size, cap) for size in sizes]
    scaled = [Fraction((size / max(counted)) ** (1 / temperature)) for size in counted]
    return tuple(value / sum(scaled) for value in scaled)


def weight_rates(weights: Sequence[float]) -> Rates:
    """w_i / Σ_j w_j, with weights as they are written: 0.1 is a tenth, not the float64 beside it."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    return tuple(weight / sum(exact) for weight in exact)


def equal_rates(num_sources: int) -> Rates:
    """1 / number of sources."""
    return (Fraction(1, num_sources),) * num_sources


def mixing_rates(settings: MixingSettings, sizes: Sequence[int]) -> Rates:
    """The share of each source.

    Args:
        settings: the method.
        sizes: records of each source, all above 0.

    Raises:
        ConfigError: not as many weights as sources.
    """
    if settings.method == "proportional":
        return proportional_rates(sizes, settings.cap)
    if settings.method == "temperature":
        return temperature_rates(sizes, settings.temperature or 1, settings.cap)
    if settings.method == "equal":
        return equal_rates(len(sizes))
    weights = settings.weights or ()
    if len(weights) != len(sizes):
        raise ConfigError(
            f"weights has {len(weights)} numbers for {len(sizes)} sources; give each source one, in the order of the sources"
        )
    return weight_rates(weights)


def largest_remainder(rates: Sequence[Fraction], total: int) -> tuple[int, ...]:
    """Whole numbers that add up to `total`, each less than 1 from r_i · total (Hamilton's method).

    Each gets the whole part; what is left goes to the largest fractional parts, of equal ones to the first.
    """
    quotas = [rate * total for rate in rates]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def largest_mixture(rates: Sequence[Fraction], sizes: Sequence[int]) -> int:
    """The most records at these rates of which none is taken twice: ⌊min_i n_i / r_i⌋, set by the scarcest source."""
    return int(min(size / rate for size, rate in zip(sizes, rates, strict=True)))


@dataclass(frozen=True)
class SourceShare:
    """What one source gives to a mixture."""

    name: str
    num_available: int
    rate: Fraction
    """What the method asks for."""
    num_records: int
    """Whole records of a mixture, with repetitions."""
    share: Fraction
    """num_records of all; differs from the rate by rounding only."""

    @property
    def epochs(self) -> float:
        """How often a mixture goes through the source."""
        return self.num_records / self.num_available


@dataclass(frozen=True)
class Composition:
    """How many records of each source are in a mixture."""

    shares: tuple[SourceShare, ...]

    @property
    def num_records(self) -> int:
        """Of a whole mixture."""
        return sum(share.num_records for share in self.shares)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Records that each source has."""
        return tuple(share.num_available for share in self.shares)

    @property
    def counts(self) -> tuple[int, ...]:
        """Records of each source in a mixture."""
        return tuple(share.num_records for share in self.shares)


def compose(settings: MixingSettings, names: Sequence[str], sizes: Sequence[int]) -> Composition:
    """The number of records of each source in a mixture.

    Args:
        settings: shares and size.
        names: of the sources, for tables and errors.
        sizes: records that each has.

    Raises:
        DataError: a source without records.
        ConfigError: not as many weights as sources; more records than can be had without repetition, where `oversample` is
            not set; or so few that a source would give none.
    """
    if not sizes:
        raise ConfigError("a mixture needs at least one source; add one")
    for name, size in zip(names, sizes, strict=True):
        if size < 1:
            raise DataError(f"source {name!r} has no records to mix; remove it, or give it some")
    rates = mixing_rates(settings, sizes)
    total = settings.num_records
    if total is None:
        counted = [size if settings.cap is None else min(size, settings.cap) for size in sizes]
        total = sum(counted) if settings.oversample else largest_mixture(rates, sizes)
    counts = largest_remainder(rates, total)
    if not settings.oversample:
        _check_enough(names, sizes, rates, counts)
    _check_none_empty(names, rates, counts, asked=settings.num_records is not None)
    return Composition(
        tuple(
            SourceShare(name, size, rate, count, Fraction(count, total))
            for name, size, rate, count in zip(names, sizes, rates, counts, strict=True)
        )
    )


def _check_enough(names: Sequence[str], sizes: Sequence[int], rates: Rates, counts: Sequence[int]) -> None:
    for name, size, rate, count in zip(names, sizes, rates, counts, strict=True):
        if count > size:
            raise ConfigError(
                f"num_records {sum(counts)} takes {count} records of source {name!r} (a share of {float(rate):.4g}), which has "
                f"{size}; lower num_records to {largest_mixture(rates, sizes)} (or omit it), give the source a smaller "
                "share, or set oversample to true so that its records are taken more than once"
            )


def _check_none_empty(names: Sequence[str], rates: Rates, counts: Sequence[int], asked: bool) -> None:
    for name, rate, count in zip(names, rates, counts, strict=True):
        if count == 0:
            remedy = "raise num_records" if asked else "set oversample to true for a larger mixture"
            raise ConfigError(
                f"source {name!r} would give no record to the mixture: its share of {float(rate):.3g} of {sum(counts)} records "
                f"rounds to none; {remedy}, give it a larger share, or remove it"
            )


SHARE_COLUMNS = ("source", "available", "rate", "taken", "share", "epochs")


def share_table(composition: Composition) -> list[tuple[str, ...]]:
    """A row a source, and one of sums, under `SHARE_COLUMNS`."""
    rows = [
        (
            share.name,
            f"{share.num_available:,}",
            f"{float(share.rate):.4%}",
            f"{share.num_records:,}",
            f"{float(share.share):.4%}",
            f"{share.epochs:.3f}",
        )
        for share in composition.shares
    ]
    available, taken = sum(composition.sizes), composition.num_records
    return [*rows, ("all", f"{available:,}", "100%", f"{taken:,}", "100%", f"{taken / available:.3f}")]


class MixtureSampler:
    """An endless sequence of mixtures: the sampler for sources that are drawn in given shares.

    Mixture e has exactly c_i records of source i, in an order drawn from (seed, stream, e). They are the next c_i of a
    permutation of the whole source; when fewer than c_i of it are left, the next mixture begins a new permutation. So
    where c_i ≤ n_i no record is twice in a mixture, nor in the ⌊n_i / c_i⌋ mixtures of one permutation; where c_i > n_i each is
    in a mixture ⌊c_i / n_i⌋ or ⌈c_i / n_i⌉ times. Position p is known without the positions before it.
    """

    def __init__(self, composition: Composition, seed: int, stream: str) -> None:
        """`stream` names the draws; source i of it has the stream "STREAM/i"."""
        self.composition = composition
        self.num_items = composition.num_records
        """Records of a mixture."""
        self._counts, self._sizes = composition.counts, composition.sizes
        self._borders = np.concatenate(([0], np.cumsum(self._counts)))
        self._starts = np.concatenate(([0], np.cumsum(self._sizes)))
        self._order = lru_cache(maxsize=2)(lambda mixture: permutation(seed, stream, mixture, self.num_items).numpy())
        # The two latest of each source: a mixture's border may lie within what is asked for.
        self._permutation = lru_cache(maxsize=2 * len(self._counts))(
            lambda i, epoch: permutation(seed, f"{stream}/{i}", epoch, self._sizes[i]).numpy()
        )

    def indices(self, start: int, count: int) -> Tensor:
        """[count] int64, the records at positions start..start+count-1 of the endless sequence.

        A record is numbered as in the sources laid end to end: record k of source i is n_0 + ... + n_(i−1) + k.
        """
        if start < 0 or count < 0:
            raise ValueError(f"start {start} and count {count} must not be negative")
        parts = [np.zeros(0, dtype=np.int64)]
        while count > 0:
            mixture, offset = divmod(start, self.num_items)
            part = self._records(mixture, self._order(mixture)[offset : offset + count])
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.from_numpy(np.concatenate(parts))

    def sources(self, indices: Tensor) -> Tensor:
        """[len(indices)] int64, the source of each record that `indices` gave."""
        return torch.from_numpy(np.searchsorted(self._starts, indices.numpy(), side="right") - 1)

    def _records(self, mixture: int, slots: np.ndarray) -> np.ndarray:
        """Records in the places `slots` of a mixture before its order is drawn, where source follows source."""
        found = np.empty(len(slots), dtype=np.int64)
        of_slot = np.searchsorted(self._borders, slots, side="right") - 1
        for i in np.unique(of_slot).tolist():
            here = of_slot == i
            found[here] = self._starts[i] + self._of_source(i, mixture, slots[here] - self._borders[i])
        return found

    def _of_source(self, i: int, mixture: int, places: np.ndarray) -> np.ndarray:
        """Records of source i at `places` (of 0..c_i−1) of a mixture."""
        count, size = self._counts[i], self._sizes[i]
        if count <= size:
            epoch, window = divmod(mixture, size // count)
            return self._permutation(i, epoch)[window * count + places]
        first = mixture * -(-count // size)
        found = np.empty(len(places), dtype=np.int64)
        for turn in np.unique(places // size).tolist():
            here = places // size == turn
            found[here] = self._permutation(i, first + turn)[places[here] % size]
        return found
