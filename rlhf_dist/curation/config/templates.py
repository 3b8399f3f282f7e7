"""Configuration of `rlhf-dist data templates`."""

from __future__ import annotations

from pydantic import Field, model_validator

from rlhf_dist.config.data import DataSource
from rlhf_dist.curation.config.base import CurationConfig


class TemplatesConfig(CurationConfig):
    """Instruction records out of labeled data sets, by templates."""

    sources: tuple[DataSource, ...] = Field(min_length=1)
    """Labeled sets of kind `instruction`, each with its `templates`; `fields` maps a name that these use to a column."""

    @model_validator(mode="after")
    def _templates_everywhere(self) -> TemplatesConfig:
        for source in self.sources:
            if source.templates is None:
                raise ValueError(
                    f"the source {source.path} has no templates; add templates: {{builtin: classification, labels: ...}} or "
                    "templates: {path: FILE.yaml}"
                )
        return self
