"""The organizer's page: what `rlhf-dist label report` prints, live."""

from __future__ import annotations

from collections.abc import Sequence

from nicegui import ui

from rlhf_dist.curation.label.page import dark_button, prepare
from rlhf_dist.curation.label_report import (
    AGREEMENT_HEADER,
    CRITERIA_HEADER,
    PROGRESS_HEADER,
    agreement_rows,
    bias_text,
    criteria_rows,
    label_report,
    progress_rows,
)
from rlhf_dist.curation.labeling import LabelTask

REFRESH_S = 5.0


def register(task: LabelTask) -> None:
    """Make the page `/report` of the server."""

    @ui.page("/report", title=f"Report: {task.config.title}")
    def report() -> None:
        prepare()
        seen = -1

        @ui.refreshable
        def numbers() -> None:
            found = label_report(task)
            ui.label(
                f"{found['pairs_judged']} of {found['pairs']} pairs judged ({found['items']} prompts, "
                f"{found['judgements']} judgements)."
            )
            _table("Progress and choices", PROGRESS_HEADER, progress_rows(found))
            ui.label(bias_text(found)).classes("bias")
            _table("Agreement", AGREEMENT_HEADER, agreement_rows(found), words=2)
            alone = found["agreement"]["all"]["pairs_judged_by_one"]
            ui.label(f"{alone} pairs were judged by one annotator only; they say nothing about agreement.").classes(
                "lab-faint"
            )
            if found["criteria"]:
                _table("Criteria", CRITERIA_HEADER, criteria_rows(found))

        def refresh() -> None:
            nonlocal seen
            if len(task.judgements) != seen:  # the measures take a while for many judgements
                seen = len(task.judgements)
                numbers.refresh()

        with ui.element("div").classes("lab-report"):
            with ui.element("div").classes("lab-head"):
                ui.label(task.config.title).classes("headline")
                ui.element("div").classes("lab-grow")
                dark_button()
            seen = len(task.judgements)
            numbers()
            ui.timer(REFRESH_S, refresh)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> None:
    """The first `words` columns are words, the others numbers."""
    ui.label(title).classes("text-weight-medium")
    with ui.element("div").classes("tablebox"), ui.element("table"):
        with ui.element("thead"), ui.element("tr"):
            for k, cell in enumerate(header):
                with ui.element("th").classes("words" if k < words else ""):
                    ui.label(cell)
        with ui.element("tbody"):
            for row in rows:
                with ui.element("tr"):
                    for k, cell in enumerate(row):
                        with ui.element("td").classes("words" if k < words else ""):
                            ui.label(cell)
