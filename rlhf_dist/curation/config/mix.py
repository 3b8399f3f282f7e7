"""Configuration of `rlhf-dist data mix`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from rlhf_dist.config.data import DataSource
from rlhf_dist.config.mixing import MixingSettings
from rlhf_dist.curation.config.base import CurationConfig


class MixSource(DataSource):
    """One of the sets that are mixed."""

    name: Annotated[str, StringConstraints(min_length=1)] | None = None
    """What its records carry in their column `source`; null keeps what a record has there, and else takes the file's name
    without its ending."""

    @property
    def label(self) -> str:
        """Name in tables and for records that have none."""
        return self.name or Path(self.path).stem


class MixConfig(CurationConfig):
    """Mixes sets of one kind in chosen shares, in an order drawn by the seed. A table of the shares is printed before anything
    is written."""

    sources: tuple[MixSource, ...] = Field(min_length=1)
    """The sets, all of one kind, or of the kinds `instruction` and `messages`, which are then both written as messages."""
    mixing: MixingSettings = MixingSettings()
    """In what shares, and how many records."""

    @model_validator(mode="after")
    def _kinds_that_mix(self) -> MixConfig:
        kinds = {source.kind for source in self.sources}
        if len(kinds) > 1 and kinds != {"instruction", "messages"}:
            raise ValueError(
                f"the sources are of kinds {', '.join(sorted(kinds))}, which make no records of one kind; make a mixture of "
                "each kind (only instruction and messages go together: as messages)"
            )
        return self

    @model_validator(mode="after")
    def _labels_are_unique(self) -> MixConfig:
        labels = [source.label for source in self.sources]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"more than one source is called {', '.join(twice)}; give each a name of its own")
        return self

    @model_validator(mode="after")
    def _a_weight_for_each(self) -> MixConfig:
        weights = self.mixing.weights
        if weights is not None and len(weights) != len(self.sources):
            raise ValueError(
                f"mixing.weights holds {len(weights)} numbers for {len(self.sources)} sources; give each source one, in the "
                "order of the sources"
            )
        return self
