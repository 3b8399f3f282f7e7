"""The labeling page: the start, where annotators say who they are, and the pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import app, ui

from rlhf_dist.core.errors import RlhfDistError
from rlhf_dist.curation.candidates import shown_tools
from rlhf_dist.curation.config.label import MAX_NAME, checked_name
from rlhf_dist.curation.judgements import CHOICES
from rlhf_dist.curation.label.texts import show_messages, show_text
from rlhf_dist.curation.labeling import MAX_COMMENT, LabelTask, Shown

STATIC = Path(__file__).parent / "static"
CHOICE_TEXTS = {"a": "A is better", "b": "B is better", "tie": "Tie", "both_bad": "Both bad", "skip": "Skip"}
CHOICE_KEYS = {"a": ("1", "←"), "b": ("2", "→"), "tie": ("3",), "both_bad": ("4",), "skip": ("S",)}
ORDER = ("a", "tie", "both_bad", "skip", "b")
HELP = (
    ("1  A  ←", "A is better"),
    ("2  B  →", "B is better"),
    ("3  T", "a tie: neither is better"),
    ("4  X", "both are bad"),
    ("S", "skip: you cannot judge this pair"),
    ("U", "undo: take back your last judgement and see its pair again"),
    ("C", "write a comment; Esc leaves it"),
    ("?", "this help"),
)
FINISHED = "finished"
"""Stands for the unit where none is left."""


def register(task: LabelTask) -> None:
    """Make the pages `/` and `/label` of the server."""
    app.add_static_files("/label_static", STATIC, follow_symlink=False)

    @ui.page("/", title=task.config.title)
    def start() -> None:
        prepare()
        _start(task)

    @ui.page("/label", title=task.config.title)
    def label(name: str = "") -> None:
        prepare()
        try:
            annotator = task.annotator(checked_name(name))
        except (ValueError, RlhfDistError) as error:
            with ui.element("div").classes("lab-start"):
                ui.label(str(error)).classes("notice")
                ui.button("Choose a name", on_click=lambda: ui.navigate.to("/")).props("outline no-caps")
            return
        _Labeling(task, annotator).build()


def prepare() -> None:
    """What every page needs in its head."""
    ui.add_head_html(
        '<link rel="stylesheet" href="/label_static/page.css"><script src="/label_static/page.js"></script>'
    )
    ui.colors(primary="#0b6bcb", negative="#b3261e")


def dark_button() -> None:
    """Between light and dark; kept in the browser."""
    ui.button(icon="contrast", color=None).props('flat dense aria-label="light or dark"').on(
        "click", js_handler="() => toggleLabelDark()"
    )


def _start(task: LabelTask) -> None:
    def enter(name: str) -> None:
        try:
            checked = checked_name(name)
        except ValueError as error:
            ui.notify(str(error), type="negative")
            return
        ui.navigate.to(f"/label?name={quote(checked, safe='')}")

    with ui.element("div").classes("lab-start"):
        ui.label(task.config.title).classes("headline")
        if task.config.guidelines:
            with ui.element("div").classes("guide"):
                show_text(task.config.guidelines)
        if task.annotators:
            ui.label("Who are you?")
            with ui.element("div").classes("people"):
                for name in task.annotators:
                    done, total = task.progress(name)
                    ui.button(f"{name} ({done} of {total})", on_click=partial(enter, name)).props("outline no-caps")
        if not task.config.annotators:
            field = ui.input("Your name" if not task.annotators else "Another name").props(
                f"outlined maxlength={MAX_NAME}"
            )
            field.on("keydown.enter", lambda: enter(field.value or ""))
            ui.button("Start", on_click=lambda: enter(field.value or "")).props("no-caps")
        ui.label(
            f"{len(task.units)} pairs of responses. Every judgement is on disk before the next pair appears; you can close the "
            "page at any time and continue later."
        ).classes("lab-faint")


class _Labeling:
    """One annotator's page. It is built anew for every pair, so that a late click meets nothing."""

    def __init__(self, task: LabelTask, annotator: str) -> None:
        self.task = task
        self.annotator = annotator
        self.shown: Shown | None = None
        self.since = 0.0
        self.criteria: dict[str, Any] = {}
        self.comment: Any = None

    def build(self) -> None:
        self.root = ui.element("div").classes("lab")
        ui.on("label_key", lambda event: self._key(event.args))
        self.help = self._help()
        self.show()

    def show(self) -> None:
        """The pair whose turn it is."""
        self.shown = self.task.current(self.annotator)
        self.criteria, self.comment = {}, None
        self.root.clear()
        with self.root:
            self._head()
            if self.shown is None:
                self._finished()
            else:
                self._pair(self.shown)
                self._foot(self.shown)
        self.root.props(f'data-unit="{self._token()}"')
        self.root.client.run_javascript("labelShown()")  # the slot of a button that was clicked is gone by now
        self.since = time.monotonic()

    def _token(self) -> str:
        return FINISHED if self.shown is None else self.shown.token

    def _key(self, args: Mapping[str, Any]) -> None:
        if args.get("unit") == self._token():
            self._do(str(args.get("choice")), self.shown)

    def _do(self, choice: str, shown: Shown | None) -> None:
        """An answer to the pair that was shown; to another one than is shown now it is none."""
        if shown != self.shown:
            return
        try:
            if choice == "undo":
                if self.task.undo(self.annotator) is None:
                    ui.notify("There is nothing to take back.")
                    return
            elif shown is None or choice not in CHOICES:
                return
            else:
                self.task.judge(
                    self.annotator,
                    shown,
                    choice,
                    criteria={name: toggle.value for name, toggle in self.criteria.items() if toggle.value},
                    comment=(self.comment.value or "") if self.comment else "",
                    seconds=time.monotonic() - self.since,
                )
        except RlhfDistError as error:
            ui.notify(f"Not saved: {error}", type="negative", timeout=0, close_button="Close")
            return
        self.show()

    def _head(self) -> None:
        done, total = self.task.progress(self.annotator)
        with ui.element("div").classes("lab-head"):
            ui.label(self.task.config.title).classes("lab-title")
            ui.element("div").classes("lab-grow")
            with (
                ui.element("div")
                .classes("lab-bar")
                .props(f'role=progressbar aria-valuenow={done} aria-valuemax={total} aria-label="pairs judged"')
            ):
                ui.element("div").style(f"width: {100 * done / max(total, 1):.2f}%")
            ui.label(f"{done} of {total}").classes("lab-count")
            ui.label(self.annotator).classes("lab-name")
            with (
                ui.button(on_click=self._chooser("undo", self.shown), color=None)
                .props("flat dense no-caps")
                .classes("undo-button")
            ):
                ui.label("Undo")
                ui.label("U").classes("keys q-ml-xs")
            ui.button(icon="help_outline", on_click=self.help.open, color=None).props(
                'flat dense aria-label="help"'
            ).classes("help-button")
            dark_button()

    def _pair(self, shown: Shown) -> None:
        item = shown.unit.item
        several = len(item.prompt) > 1
        with ui.element("div").classes("pane prompt"), _body("prompt"):
            if not several:
                ui.label("Prompt").classes("turn-role")
            show_messages(item.prompt, roles=several)
            if item.tools:
                ui.label("Tools").classes("turn-role")
                show_text(shown_tools(item.tools))
        with ui.element("div").classes("pair"):
            for side, index in (("a", shown.left), ("b", shown.right)):
                messages = item.candidates[index]
                with ui.element("div").classes(f"pane side-{side}"):
                    ui.label(f"Response {side.upper()}").classes("pane-head")
                    with _body(f"response {side.upper()}"):
                        show_messages(messages, roles=len(messages) > 1)

    def _foot(self, shown: Shown) -> None:
        before = shown.before
        config = self.task.config
        with ui.element("div").classes("foot"):
            if config.criteria or config.comments:
                with ui.element("div").classes("extras"):
                    for name in config.criteria:
                        with ui.element("div").classes("criterion"):
                            ui.label(f"More {name}?").classes("lab-faint")
                            self.criteria[name] = ui.toggle(
                                {"a": "A", "tie": "=", "b": "B"},
                                value=before.criteria.get(name) if before else None,
                                clearable=True,
                            ).props("unelevated dense no-caps toggle-color=none")
                    if config.comments:
                        self.comment = (
                            ui.input(placeholder="Comment (C)", value=before.comment if before else "")
                            .classes("comment")
                            .props(f'outlined dense maxlength={MAX_COMMENT} aria-label="comment"')
                        )
            with ui.element("div").classes("choices"):
                for choice in ORDER:
                    mark = " choice-before" if before and before.choice == choice else ""
                    button = ui.button(on_click=self._chooser(choice, shown), color=None).props("unelevated no-caps")
                    with button.classes(f"choice choice-{choice}{mark}"):
                        ui.label(CHOICE_TEXTS[choice])
                        ui.label(" ".join(CHOICE_KEYS[choice])).classes("keys")

    def _chooser(self, choice: str, shown: Shown | None) -> Callable[[], None]:
        return lambda: self._do(choice, shown)

    def _finished(self) -> None:
        skipped = self.task.skipped(self.annotator)
        with ui.element("div").classes("done"):
            ui.label("Everything is judged. Thank you!").classes("done-title")
            ui.label("You can close this page, or take back your last judgement.").classes("lab-faint")
            if skipped:
                text = "Show the skipped pair again" if skipped == 1 else f"Show the {skipped} skipped pairs again"
                ui.button(text, on_click=self._reopen).props("outline no-caps")

    def _reopen(self) -> None:
        try:
            self.task.reopen_skipped(self.annotator)
        except RlhfDistError as error:
            ui.notify(f"Not saved: {error}", type="negative", timeout=0, close_button="Close")
        self.show()

    def _help(self) -> ui.dialog:
        with ui.dialog() as dialog, ui.card():
            if self.task.config.guidelines:
                show_text(self.task.config.guidelines)
            with ui.element("div").classes("help"):
                for keys, text in HELP:
                    ui.label(keys).classes("keys")
                    ui.label(text)
            ui.button("Close", on_click=dialog.close).props("flat no-caps")
        return dialog


def _body(name: str) -> ui.element:
    """A part that scrolls, also by keys when it is focused."""
    return ui.element("div").classes("pane-body").props(f'tabindex=0 role=region aria-label="{name}"')
