"""Schema of `rlhf-dist label`."""

from __future__ import annotations

import unicodedata
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from rlhf_dist.config.base import AbsolutePath, PositiveInt, Schema
from rlhf_dist.config.data import DataSource
from rlhf_dist.curation.config.base import CurationConfig

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY_ADDRESS = ("0.0.0.0", "::")
MAX_NAME = 60
"""Characters of the name of an annotator or a criterion."""


def checked_name(name: str) -> str:
    """A name without white space around it, in Unicode's composed form.

    Raises:
        ValueError: it is empty, longer than `MAX_NAME`, or holds characters that cannot be seen.
    """
    name = unicodedata.normalize("NFC", name).strip()
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ValueError(f"{name[:80]!r} is no name: give 1 to {MAX_NAME} printable characters")
    return name


Name = Annotated[str, AfterValidator(checked_name)]


def _unique(names: tuple[str, ...]) -> tuple[str, ...]:
    folded = [name.casefold() for name in names]
    for name in names:
        if folded.count(name.casefold()) > 1:
            raise ValueError(f"{name!r} stands there twice (upper and lower case are the same); name each once")
    return names


Names = Annotated[tuple[Name, ...], AfterValidator(_unique)]


class LabelServer(Schema):
    """Where the page is served."""

    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1 and ::1 are this machine alone. With another one, people on the network reach the page
    over plain HTTP: whoever reads the traffic reads the token. Prefer `ssh -L 8400:127.0.0.1:8400 HOST`."""
    port: int = Field(default=8400, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names, without port, under which browsers reach the page (for a `host` other than loopback). Requests for any
    other name are rejected, so that no foreign site can reach the page through a name of its own."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host in LOOPBACK

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if self.host in ANY_ADDRESS and not self.allowed_hosts:
            raise ValueError(
                f"server.host is {self.host}, every address of this machine, and allowed_hosts is empty; name there what "
                "people type into the browser, such as [labels.example.org]"
            )
        return self


class LabelExport(Schema):
    """What `rlhf-dist label export` writes."""

    policy: Literal["majority", "plurality", "unanimous", "each"] = "majority"
    """What several judgements of one pair become: `majority` takes the response that more than half of the votes prefer (a tie
    and "both bad" are votes); `plurality` the one that more votes prefer than the other; `unanimous` the one that all votes
    prefer; `each` makes a record of every vote. Pairs without a winner are skipped and counted."""
    margins: bool = True
    """Write the share of votes for the chosen response less that for the other as `margin`, where several judged a pair. What
    one person judged has none, which training with `reward.margin_coef` takes for 0; set false where only some pairs have
    several votes."""
    annotators: Names = ()
    """Use the judgements of these annotators only; of all when empty."""
    source: str = ""
    """Written as `source` into each record, where it is not empty: the name of the set, for measures by source."""


class LabelConfig(CurationConfig):
    """A page on which people choose between two responses: `rlhf-dist label CONFIG` serves it, `rlhf-dist label export CONFIG`
    writes preference records, `rlhf-dist label report CONFIG` shows progress, agreement and position bias."""

    out_dir: AbsolutePath
    """Folder of the work: `judgements.jsonl` (grows with every judgement), `config.yaml`, `tokens.json`, `bad_rows.jsonl` where
    rows were skipped, and what `export` and `report` write. The same configuration continues where the folder stands."""
    overwrite: bool = False
    """`export`: replace an earlier export. Judgements are never overwritten."""
    sources: tuple[DataSource, ...] = Field(min_length=1)
    """What is judged: kind `candidates` (prompt, candidates), or `preference` for records with two or more responses whose
    order is to be ignored."""
    pairs: Literal["all", "chain", "one"] = "all"
    """Which pairs of K candidates are shown: `all` K(K-1)/2; `chain` K-1, in a drawn order, so that each candidate is in one;
    `one` drawn pair. Candidates of the same text never meet."""
    annotators: Names = ()
    """Who may judge; anyone who has the address when empty. Names are chosen on the page: there are no passwords."""
    overlap: PositiveInt | None = None
    """How many of `annotators` judge each prompt; the prompts are shared out evenly. null: everyone judges everything."""
    criteria: Names = ("helpful", "honest", "harmless")
    """What can be compared beside the choice, optional for the annotator; empty for none."""
    comments: bool = True
    """Offer a field for a comment."""
    title: str = "Which response is better?"
    """Headline of the page."""
    guidelines: str = ""
    """What annotators are to look for, as plain text; shown before they begin and whenever they ask."""
    server: LabelServer = LabelServer()
    export: LabelExport = LabelExport()

    @model_validator(mode="after")
    def _check_overlap(self) -> Self:
        if self.overlap is not None and self.overlap > len(self.annotators):
            raise ValueError(
                f"overlap is {self.overlap} but annotators names {len(self.annotators)}; work is shared out among named "
                "annotators: name at least as many, or set overlap to null"
            )
        return self
