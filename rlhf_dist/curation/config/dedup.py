"""Configuration of `rlhf-dist data dedup`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_dist.config.base import Count, PositiveInt, Schema
from rlhf_dist.config.data import DataSource
from rlhf_dist.curation.config.base import CurationConfig

Normalization = Literal["unicode", "case", "punctuation", "whitespace"]
OpenShare = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Threshold = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class NearDuplicates(Schema):
    """Texts that are nearly the same: their sets of shingles have a Jaccard similarity of `threshold` or more. Candidates are
    found by MinHash and banding, and each is then compared by its true Jaccard similarity."""

    threshold: Threshold = 0.8
    """Least Jaccard similarity |A ∩ B| / |A ∪ B| of two near-duplicates."""
    shingle: Literal["characters", "words"] = "characters"
    """What texts are cut into: runs of `shingle_size` characters (any language; finer) or words (for long documents)."""
    shingle_size: PositiveInt = 5
    """Characters or words of a shingle."""
    num_permutations: Annotated[int, Field(ge=16, le=1024)] = 128
    """Values of a MinHash signature. More find candidates more surely, and take more time and disk."""
    recall: OpenShare = 0.99
    """Least probability that two texts of exactly `threshold` become candidates; those that are more similar become so more
    surely. Bands are made as long as this allows: longer ones leave fewer pairs to compare."""
    max_bucket: PositiveInt = 1000
    """Kept records of one bucket (records with an equal band) that are candidates for a record, at most. This and
    `max_compared` bound the time where very many texts are alike, but below the threshold, as those of one long template are;
    where either cut something off, the report says so."""
    max_compared: PositiveInt = 100
    """Candidates that a record is compared with by true similarity, at most: those of the highest estimates."""


class Decontamination(Schema):
    """Records that share a run of words with a record of an evaluation set are removed."""

    against: dict[str, DataSource] = Field(min_length=1)
    """The evaluation sets, each under a name for the report."""
    num_words: PositiveInt = 13
    """Length of the shared run of words (GPT-3 used 8 to 13). Case, punctuation and spacing do not count; a character of a
    script without spaces (Chinese, Japanese) counts as a word."""
    min_words: PositiveInt = 8
    """Evaluation records that are shorter than `num_words` are looked for whole when they have at least this many words;
    those below are counted, and not looked for."""
    max_common: PositiveInt = 10
    """A run of words that is in more than so many records of one evaluation set is its template, not its content, and is not
    looked for."""

    @model_validator(mode="after")
    def _shorter_than_whole(self) -> Decontamination:
        if self.min_words > self.num_words:
            raise ValueError(
                f"min_words {self.min_words} is more than num_words {self.num_words}; a record that is looked for whole is the "
                "shorter one: lower min_words or raise num_words"
            )
        return self


class DedupSettings(Schema):
    """What counts as the same."""

    fields: tuple[str, ...] | None = None
    """Fields of a record that are compared, e.g. [instruction, input]; null compares all the text of its kind. A field that a
    record lacks counts as empty."""
    normalize: tuple[Normalization, ...] = ("unicode", "case", "whitespace")
    """What does not make a difference: `unicode` (NFKC: full-width letters, ligatures, ...; zero-width characters), `case`,
    `punctuation`, `whitespace`. [] compares texts as they are. Code needs case and whitespace."""
    exact: bool = True
    """Remove records whose normalized text an earlier record has."""
    near: NearDuplicates | None = NearDuplicates()
    """Remove records that are nearly the same as an earlier one that is kept; null leaves them."""


class DedupConfig(CurationConfig, DedupSettings):
    """Removes duplicates within and across the sources, and records that evaluation sets contain. Of records that are the
    same, the first is kept, in the order of the sources and of their rows. What is removed is written to `removed.jsonl`,
    each record with its place, the reason, and what it is the same as."""

    sources: tuple[DataSource, ...] = Field(min_length=1)
    """Where the records come from, all of one kind."""
    decontaminate: Decontamination | None = None
    """Evaluation sets that must not be in the result."""
    num_processes: Count | None = None
    """Processes that fingerprint texts while this one reads; null takes a process a core but one, 0 does all in this one. The
    result is the same."""

    @model_validator(mode="after")
    def _one_kind_and_something_to_do(self) -> DedupConfig:
        kinds = sorted({source.kind for source in self.sources})
        if len(kinds) > 1:
            raise ValueError(f"the sources are of kinds {', '.join(kinds)}; call the command once for each kind")
        if not self.exact and self.near is None and self.decontaminate is None:
            raise ValueError(
                "exact is false, near and decontaminate are null, so nothing would be done; set one of them"
            )
        return self
