"""In what shares the records of several sources are mixed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_dist.config.base import Positive, PositiveInt, Schema

MixingMethod = Literal["proportional", "temperature", "weights", "equal"]


class MixingSettings(Schema):
    """How often each source is drawn from, and how many records a mixture has."""

    method: MixingMethod = "proportional"
    """`proportional`: by the number of records, each source counted up to `cap` (T5's examples-proportional mixing: rate_i =
    min(n_i, K) / Σ min(n_j, K)). `temperature`: those rates to the power 1/T, made to add up to 1 again. `weights`: by
    `weights`. `equal`: the same for each source."""
    cap: PositiveInt | None = None
    """`proportional` and `temperature`: K, the number of records beyond which a source is counted as no larger. It bounds the
    source's rate, not which of its records may be drawn: those come from the whole source. null counts all."""
    temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """`temperature` only: T. 1 is `proportional`; the larger, the nearer to `equal`."""
    weights: tuple[Positive, ...] | None = None
    """`weights` only: one number a source, in the order of the sources; they need not add up to 1."""
    num_records: PositiveInt | None = None
    """Records of the mixture. null: as many as there can be in these shares without taking one twice; with `oversample`, as
    many as the sources hold together, each counted up to `cap`."""
    oversample: bool = False
    """Take records of a small source more than once where its share needs it; each as often as the next, to within one."""

    @model_validator(mode="after")
    def _only_what_the_method_uses(self) -> MixingSettings:
        if self.cap is not None and self.method not in ("proportional", "temperature"):
            raise ValueError(
                f"cap is {self.cap}, but method {self.method!r} does not look at sizes; leave cap out, or set method to "
                "proportional or temperature"
            )
        for name, value in (("temperature", self.temperature), ("weights", self.weights)):
            if value is not None and self.method != name:
                shown = list(value) if isinstance(value, tuple) else f"{value:g}"
                raise ValueError(
                    f"{name} is {shown}, but method {self.method!r} does not use it; leave {name} out, or set method to {name}"
                )
            if value is None and self.method == name:
                raise ValueError(f"method {name!r} needs {name}; set it, or choose another method")
        return self
