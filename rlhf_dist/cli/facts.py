"""What a run says of itself before it starts, beyond the sizes of its data."""

from __future__ import annotations

from rlhf_dist.config import TrainedModel


def describe_trained(model: TrainedModel, role: str, scalar: bool) -> dict[str, str]:
    """What of a role's model is trained and what is frozen, as counts by part; nothing where all of it is trained.

    Raises:
        ConfigError: the model cannot be frozen or adapted as asked.
    """
    if model.lora is None and not model.freeze.any:
        return {}
    from rlhf_dist.planning.architecture import trained_counts  # the model on the meta device: for those who ask only

    trained, frozen = trained_counts(model.model_path, scalar, model.freeze, model.lora)
    total = sum(elements for part in (trained, frozen) for _, elements in part.values())
    facts = {}
    for name, parts in (("trained", trained), ("frozen", frozen)):
        elements = sum(count for _, count in parts.values())
        listed = ", ".join(f"{part} {count:,} in {tensors}" for part, (tensors, count) in sorted(parts.items()))
        facts[f"{role}: {name} parameters"] = (
            f"{elements:,} of {total:,} ({elements / total:.2%}): {listed or 'none'} tensors"
        )
    return facts
