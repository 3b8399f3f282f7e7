"""What was recognized in rows is on the terminal, whichever data command reads them."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from support.scripted import ScriptedGenerator, made_up_tasks

from rlhf_dist.cli.main import main
from rlhf_dist.curation.commands import judge, responses, self_instruct
from rlhf_dist.curation.label import server

TURNS = [{"from": "human", "value": "Name a bird."}, {"from": "gpt", "value": "Wren"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Name a bird."}]}]
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1}
COMPLETION = {"prompt": "Name a bird.", "completion": "Wren"}
SAMPLING = {"max_response_tokens": 2}
GENERATOR = {"model": "m", "sampling": SAMPLING}


@pytest.mark.parametrize(
    ("command", "kind", "row", "settings", "note"),
    [
        ("data mix", "messages", {"conversations": TURNS}, {}, "ShareGPT"),
        ("data dedup", "messages", {"conversations": TURNS}, {"num_processes": 0}, "ShareGPT"),
        ("data pairs", "preference", PAIR, {}, "score_chosen"),
        ("data responses", "instruction", COMPLETION, {"generators": [GENERATOR | {"num_responses": 2}]}, "completion"),
        ("data judge", "preference", {"prompt": PARTS, "chosen": "a", "rejected": "b"}, {"judge": GENERATOR}, "parts"),
        (
            "data self-instruct",
            "instruction",
            COMPLETION,
            {"generator": GENERATOR, "num_records": 3, "max_requests": 4, "seed_examples": 1},
            "completion",
        ),
        ("label", "preference", {"prompt": PARTS, "chosen": "a", "rejected": "b"}, {}, "parts"),
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
    monkeypatch.setattr(self_instruct, "load_generator", lambda *_: ScriptedGenerator(made_up_tasks))
    answers = cycle(["[[A]]", "[[B]]"])  # of a pair in both orders: the same response
    monkeypatch.setattr(judge, "load_generator", lambda *_: ScriptedGenerator(lambda _: next(answers)))
    monkeypatch.setattr(server, "serve_page", lambda *_: None)  # as if it was served and ended
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    sources = [{"path": str(tmp_path / "rows.jsonl"), "kind": kind}]
    key = {"data responses": "prompts", "data self-instruct": "seeds"}.get(command, "sources")
    config = {"out_dir": str(tmp_path / "out"), key: sources, **settings}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert main([*command.split(), str(tmp_path / "config.yaml")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert note in shown
    assert "1 rows" in shown
