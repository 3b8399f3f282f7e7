"""What every configuration model shares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Schema(BaseModel):
    """A frozen model that rejects unknown keys; attribute docstrings become the help texts."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, protected_namespaces=()
    )


T = TypeVar("T")


@dataclass(frozen=True)
class Decides:
    """Marks a field that decides a run's result, and so belongs to the run's identity (`run/identity.py`). A marked section
    counts with all that is in it. What is not marked (layout, memory, bookkeeping) may change when a run resumes."""

    what: Literal["result", "data", "length"] = "result"
    by: Callable[[Any], Any] | None = None
    """Value → what of it decides; None: the value itself."""


Result = Annotated[T, Decides("result")]
"""`batch_size: Result[PositiveInt]`: another value is another run."""
DataContent = Annotated[T, Decides("data")]
"""Decides which tokens are trained on, and nothing else: a run that has read them goes by their fingerprint instead."""
RunLength = Annotated[T, Decides("length")]
"""Decides how long a run is: it may be extended when it resumes."""

Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _absolute_directory(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).is_dir() else path


# A path is meant from where the command is given; the processes that use it may run elsewhere.
AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]


def sha256_of(path: Path | None) -> str | None:
    """What a file holds; the path itself where it cannot be read, which other checks report."""
    try:
        return None if path is None else f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    except OSError:
        return str(path)


ModelPath = Annotated[str, AfterValidator(_absolute_directory)]
"""A directory, made absolute, or a hub name, left as it is."""
