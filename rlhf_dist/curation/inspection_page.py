"""The page of `data inspect`: one HTML file without scripts, which asks for nothing from anywhere.

Data are untrusted text. Everything is escaped by Jinja, what acts on the display is shown by its code point
(`text_quality.visible`), and a content security policy forbids scripts and requests, should anything get through all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from rlhf_dist.curation.inspection import SetReport
from rlhf_dist.curation.text_quality import visible
from rlhf_dist.curation.token_spans import Piece, runs

_WIDTH, _HEIGHT = 640, 110
"""Of a histogram, in the units of its SVG."""


def render_page(title: str, summary: Mapping[str, str], sets: Sequence[SetReport]) -> str:
    """The whole page.

    Args:
        title: of the page.
        summary: what was looked at, name → value.
        sets: what was found in each data set.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": _count, "percent": _percent, "parts": _parts, "bars": _bars}
    source = resources.files("rlhf_dist.curation").joinpath("inspection.html.jinja").read_text("utf-8")
    return environment.from_string(source).render(title=title, summary=summary, sets=sets) + "\n"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _parts(those: Sequence[Piece]) -> list[tuple[str, str, list[tuple[str, str, list[tuple[str, bool]]]]]]:
    """Runs of pieces: (classes of the run, hint, its tokens as (classes, hint, visible parts))."""
    found = []
    for run in runs(those):
        first = run[0]
        names = [name for name in ("target", "special", "unknown", "skipped") if getattr(first, name)]
        learnt = "learnt" if first.target else "context"
        tokens = []
        for number, piece in enumerate(run):
            several = f", {piece.num_tokens} tokens" if piece.num_tokens > 1 else ""
            tokens.append(("odd" if number % 2 else "even", learnt + several, list(visible(piece.text))))
        found.append((" ".join(names), learnt, tokens))
    return found


def _bars(lengths: Mapping[str, Any]) -> dict[str, Any]:
    """Rectangles of a histogram of lengths, and where the longest allowed length is."""
    edges, counts = lengths["histogram"]["edges"], lengths["histogram"]["counts"]
    low, span, most = edges[0], edges[-1] - edges[0], max(counts)
    limit = lengths["max_length_tokens"]
    bars = [
        {
            "x": round((a - low) / span * _WIDTH, 2),
            "width": round(max((b - a) / span * _WIDTH - 1, 0.5), 2),
            "y": round(_HEIGHT - count / most * _HEIGHT, 2),
            "height": round(count / most * _HEIGHT, 2),
            "hint": f"{a:,} to {b - 1:,} tokens: {count:,}" if b - a > 1 else f"{a:,} tokens: {count:,}",
        }
        for a, b, count in zip(edges, edges[1:], counts, strict=False)
        if count
    ]
    inside = low <= limit < edges[-1]
    return {
        "bars": bars,
        "width": _WIDTH,
        "height": _HEIGHT,
        "low": low,
        "high": lengths["longest"],
        "most": most,
        "limit": round((limit - low) / span * _WIDTH, 2) if inside else None,
    }
