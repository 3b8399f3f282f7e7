"""Pictures of results. matplotlib comes with the extra `curation`; without it there are no pictures, and the numbers stand
in the JSON beside them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_BETTER, _WORSE, _INK = "#1b6ca8", "#d1733b", "#444444"


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def plot_reward_model(report: Mapping[str, Any], path: Path) -> None:
    """Calibration curve and score histograms of a reward model's evaluation (`trainers/reward_evaluation.py`), as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(10, 4.2), layout="constrained"
    )  # no pyplot: it keeps a global state and looks for a display
    curve, scores = figure.subplots(1, 2)
    found = report["calibration"]
    curve.plot([0.5, 1], [0.5, 1], color=_INK, linewidth=1, linestyle="--", label="perfect")
    sizes = [20 + 400 * weight for weight in found["weight"]]
    curve.plot(found["confidence"], found["accuracy"], color=_BETTER, linewidth=1.5)
    curve.scatter(
        found["confidence"], found["accuracy"], s=sizes, color=_BETTER, alpha=0.8, label="pairs, area by number"
    )
    curve.set(
        xlim=(0.48, 1.02),
        ylim=(0, 1.05),
        xlabel="confidence σ(|Δr|)",
        ylabel="share of pairs that are right",
        title=f"Calibration: accuracy {report['accuracy']:.3f}, ECE {found['ece']:.3f} ({report['num_pairs']} pairs)",
    )
    curve.legend(loc="lower right", frameon=False)
    histogram = report["histogram"]
    edges = histogram["edges"]
    for name, color in (("better", _BETTER), ("worse", _WORSE)):
        scores.stairs(histogram[name], edges, fill=True, alpha=0.45, color=color, label=f"{name} responses")
        scores.stairs(histogram[name], edges, color=color, linewidth=1.2)
    scores.set(xlabel="score", ylabel="responses", title="Scores of held-out responses")
    scores.legend(frameon=False)
    for axes in (curve, scores):
        axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=130, format="png")
    temporary.replace(path)
