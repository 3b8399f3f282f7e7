"""What every configuration model shares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Schema(BaseModel):
    """A frozen model that refuses unknown keys; attribute docstrings become the help texts."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, protected_namespaces=()
    )


Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _absolute_directory(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).is_dir() else path


# A path is meant from where the command is given; the processes that use it may run elsewhere.
AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]
ModelPath = Annotated[str, AfterValidator(_absolute_directory)]
"""A directory, made absolute, or a hub name, left as it is."""
