"""The run summary: what a run prints of its data, models and shares before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_dist.config.hosting import TrainedModel
from rlhf_dist.run.console import print_table


def describe_trained(model: TrainedModel, role: str, scalar: bool) -> dict[str, str]:
    """What of a role's model is trained and what is frozen, as counts by part; nothing where all of it is trained.

    Raises:
        ConfigError: the model cannot be frozen or adapted as asked.
    """
    if model.lora is None and not model.freeze.any:
        return {}
    from rlhf_dist.models.architecture import trained_counts  # the model on the meta device: for those who ask only

    trained, frozen = trained_counts(model.model_path, scalar, model.freeze, model.lora)
    total = sum(elements for part in (trained, frozen) for _, elements in part.values())
    summary = {}
    for name, parts in (("trained", trained), ("frozen", frozen)):
        elements = sum(count for _, count in parts.values())
        listed = ", ".join(f"{part} {count:,} in {tensors}" for part, (tensors, count) in sorted(parts.items()))
        summary[f"{role}: {name} parameters"] = (
            f"{elements:,} of {total:,} ({elements / total:.2%}): {listed or 'none'} tensors"
        )
    return summary


def describe_data(**datasets: Any) -> dict[str, Any]:
    """Sizes of data sets, and what was skipped or truncated of them, with the first places."""
    summary: dict[str, Any] = {}
    for name, dataset in datasets.items():
        label = name.replace("held_out", "held-out").replace("_", " ")
        summary[label] = len(dataset) if dataset is not None else 0
        if dataset is None:
            continue
        summary |= {f"{label}: {loss}": found for loss, found in dataset.report.losses().items()}
    return summary


def print_shares(shares: Sequence[dict[str, Any]]) -> None:
    """A table of what each set gives to an epoch, where there are several."""
    if shares:
        percent = {"rate", "share", "share_of_tokens"}
        rows = [[f"{v:.2%}" if k in percent else str(v) for k, v in row.items()] for row in shares]
        header = [name.replace("_", " ") for name in shares[0]]
        print_table("training records of an epoch, by source", rows, header=header)
