"""A named set of records, whole or divided into parts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from rlhf_dist.config.base import DataContent, Schema
from rlhf_dist.config.data import DataSource

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
_TOLERANCE = 1e-9
"""Shares such as 0.7 + 0.2 + 0.1 need not add up to 1 exactly."""


class DataSet(Schema):
    """Records of one kind under a name that later stages refer to, whole or divided into parts."""

    name: Name
    """Later stages refer to `${data.NAME}`, or `${data.NAME.PART}` where the set is divided."""
    sources: DataContent[tuple[DataSource, ...]] = Field(min_length=1)
    """Where the records come from, all of one kind. Columns are kept as they are, so that a later stage may read them as
    another kind."""
    parts: DataContent[dict[Name, Share]] = Field(default_factory=dict)
    """Divides the set: name of a part → its share of the records, e.g. {sft: 0.5, reward: 0.4, eval: 0.1}. Records of one
    prompt (plain texts: the same text) are in one part. What the shares leave is in no part. Drawn by the seed; a record
    stays where it is when others are added, but for those at the borders."""

    @model_validator(mode="after")
    def _one_kind(self) -> DataSet:
        kinds = sorted({source.kind for source in self.sources})
        if len(kinds) > 1:
            raise ValueError(
                f"the sources of set {self.name!r} are of kinds {', '.join(kinds)}; make a set of each kind"
            )
        return self

    @model_validator(mode="after")
    def _rendered_where_read(self) -> DataSet:
        # A part must hold whole rows: rendered ones could lie on both sides of a border.
        if any(source.templates is not None for source in self.sources):
            raise ValueError(
                f"a source of set {self.name!r} has templates, and a set keeps rows as they are; put templates where the set "
                f"is read: {{path: ${{data.{self.name}}}, kind: instruction, templates: ...}}"
            )
        return self

    @model_validator(mode="after")
    def _shares_of_a_whole(self) -> DataSet:
        total = sum(self.parts.values())
        if total > 1 + _TOLERANCE:
            raise ValueError(f"the parts of set {self.name!r} add up to {total:g}, more than 1; lower a share")
        return self
