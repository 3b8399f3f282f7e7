"""What was recognized in rows is on the terminal, whichever data command reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.scripted import ScriptedGenerator

from rlhf_dist.cli.main import main
from rlhf_dist.curation.commands import responses

TURNS = [{"from": "human", "value": "Name a bird."}, {"from": "gpt", "value": "Wren"}]
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1}
COMPLETION = {"prompt": "Name a bird.", "completion": "Wren"}
SAMPLING = {"max_response_tokens": 2}


@pytest.mark.parametrize(
    ("command", "kind", "row", "settings", "note"),
    [
        ("mix", "messages", {"conversations": TURNS}, {}, "ShareGPT"),
        ("dedup", "messages", {"conversations": TURNS}, {"num_processes": 0}, "ShareGPT"),
        ("pairs", "preference", PAIR, {}, "score_chosen"),
        (
            "responses",
            "instruction",
            COMPLETION,
            {"generators": [{"model": "m", "num_responses": 2, "sampling": SAMPLING}]},
            "completion",
        ),
    ],
)
def test_notes_are_in_the_tables(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    kind: str,
    row: dict[str, Any],
    settings: dict[str, Any],
    note: str,
) -> None:
    monkeypatch.setattr(responses, "load_generator", lambda *_: ScriptedGenerator(lambda request: f"{request.key}"))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    sources = [{"path": str(tmp_path / "rows.jsonl"), "kind": kind}]
    config = {"out_dir": str(tmp_path / "out"), "prompts" if command == "responses" else "sources": sources, **settings}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert main(["data", command, str(tmp_path / "config.yaml")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert note in shown
    assert "1 rows" in shown
