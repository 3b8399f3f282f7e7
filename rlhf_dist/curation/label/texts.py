"""Prompts and responses on the page. They are untrusted: each reaches the browser as text of an element, never as markup."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from nicegui import ui

from rlhf_dist.curation.candidates import shown_text
from rlhf_dist.data.chat_template import Message

_FENCE = re.compile(
    r"^(?P<fence>`{3,}|~{3,})[ ]*(?P<name>[^\n`]*)\n(?P<code>.*?)^(?P=fence)[`~]*[ ]*$\n?", re.DOTALL | re.MULTILINE
)


def parts(text: str) -> Iterator[tuple[str, str, str]]:
    """A text as ("text", "", ...) and ("code", language, ...) parts. Nothing is changed but that the lines of fences are left
    out; what is not closed stays text."""
    end = 0
    for fence in _FENCE.finditer(text):
        if fence.start() > end:
            yield "text", "", text[end : fence.start()]
        yield "code", fence["name"].strip(), fence["code"]
        end = fence.end()
    if end < len(text):
        yield "text", "", text[end:]


def show_text(text: str) -> None:
    """A text with its white space; blocks of code apart, in a fixed width."""
    if not text.strip():
        ui.label("(empty response)").classes("empty")
        return
    for kind, name, part in parts(text):
        if kind == "text":
            if part.strip():
                ui.label(part.strip("\n")).classes("text")
            continue
        if name:
            ui.label(name).classes("code-name")
        ui.label(part.removesuffix("\n")).classes("code").props("tabindex=0")


def show_messages(messages: Sequence[Message], *, roles: bool) -> None:
    """Messages one below the other, with the names of their roles where `roles`."""
    for message in messages:
        if not roles:
            show_text(shown_text(message))
            continue
        with ui.element("div").classes(f"turn turn-{message['role']}"):
            ui.label(message["role"].capitalize()).classes("turn-role")
            show_text(shown_text(message))
