"""`rlhf-dist label`, `label export` and `label report` from the command line, without the page."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.curation.candidates import item_id
from rlhf_dist.curation.config.label import LabelServer
from rlhf_dist.curation.label import server, texts
from rlhf_dist.curation.label.texts import parts

ROOT = Path(__file__).resolve().parents[3]
ROWS = [{"prompt": f"p{n}", "candidates": [f"x{n}", f"y{n}"]} for n in range(4)]


def judgement(n: int, choice: str, annotator: str = "ann") -> dict[str, Any]:
    return {"item": item_id(f"p{n}", [f"x{n}", f"y{n}"]), "annotator": annotator, "choice": choice, "shown": [0, 1]}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    source = write(tmp_path / "c.jsonl", ROWS)
    return ["--out_dir", str(tmp_path / "out"), "--sources", f"[{{path: {source}, kind: candidates}}]"]


def test_export_and_report(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]):
    said = [judgement(0, "a"), judgement(1, "b"), judgement(2, "tie"), judgement(3, "skip"), judgement(0, "a", "bob")]
    write(tmp_path / "out" / "judgements.jsonl", said)
    assert main(["label", "export", *arguments, "--export.source", "pilot"]) == 0
    printed = capsys.readouterr()
    assert "pairs that nobody prefers a response of | 1" in printed.out
    assert "1 of 2 records have a margin" in printed.err
    export = tmp_path / "out" / "export"
    records = [json.loads(line) for line in (export / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in records] == [("p0", "x0", "y0"), ("p1", "y1", "x1")]
    assert [r.get("margin") for r in records] == [1.0, None]
    assert json.loads((export / "report.json").read_text())["pairs without a record"] == 1
    assert main(["label", "export", *arguments]) == 5
    assert main(["label", "export", *arguments, "--overwrite", "true", "--export.annotators", "[bob]"]) == 0
    assert len((export / "records.jsonl").read_text().splitlines()) == 1
    capsys.readouterr()
    assert main(["label", "export", *arguments, "--overwrite", "true", "--export.margins", "false"]) == 0
    assert "margin" not in (export / "records.jsonl").read_text()
    assert capsys.readouterr().err == ""
    assert main(["label", "report", *arguments]) == 0
    assert "3 of 4 pairs judged" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "label_report.json").read_text())["judgements"] == 5


def test_rows_that_are_skipped_are_listed_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    source = write(tmp_path / "c.jsonl", [*ROWS, {"prompt": "alone", "candidates": ["x"]}, {"prompt": "none"}])
    sources = f"[{{path: {source}, kind: candidates, on_bad_row: skip}}]"
    out = tmp_path / "out"
    arguments = ["--out_dir", str(out), "--sources", sources]

    def listed(folder: Path) -> list[Any]:
        return [json.loads(line)["row"]["prompt"] for line in (folder / "bad_rows.jsonl").read_text().splitlines()]

    monkeypatch.setattr(server, "serve_page", lambda task, path: None)  # as if it was served and ended
    assert main(["label", *arguments]) == 0
    assert "2 rows are skipped" in capsys.readouterr().out
    assert listed(out) == ["alone", "none"]
    assert main(["label", *arguments]) == 0  # the folder is known again
    (out / "bad_rows.jsonl").unlink()

    write(out / "judgements.jsonl", [judgement(0, "a")])
    assert main(["label", "report", *arguments]) == 0
    assert listed(out) == ["alone", "none"]
    assert json.loads((out / "label_report.json").read_text())["bad_rows"] == 2
    assert main(["label", "export", *arguments]) == 0
    assert listed(out / "export") == ["alone", "none"]
    assert json.loads((out / "export" / "report.json").read_text())["bad rows"] == 2

    write(source, ROWS)  # fixed
    assert main(["label", "report", *arguments]) == 0
    assert not (out / "bad_rows.jsonl").exists()
    assert json.loads((out / "label_report.json").read_text())["bad_rows"] == 0


@pytest.mark.parametrize(
    ("said", "more", "problem"),
    [
        (None, [], "nothing has been judged yet"),
        ([judgement(0, "tie")], [], "no pair has a winner by export.policy majority"),
        ([judgement(0, "a")], ["--export.annotators", "[zoe]"], "names 'zoe', of whom there is no judgement"),
        ([judgement(9, "a")], [], "not in the sources"),
        ([judgement(0, "c")], [], "choice is 'c'"),
    ],
)
def test_what_cannot_be_exported_is_rejected(
    tmp_path: Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    said: list[dict[str, Any]] | None,
    more: list[str],
    problem: str,
):
    if said is not None:
        write(tmp_path / "out" / "judgements.jsonl", said)
    assert main(["label", "export", *arguments, *more]) == 3
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out" / "export").exists()


def test_a_port_in_use_is_rejected_before_anything_is_served(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["label", *arguments, "--server.port", str(port)]) == 2
    assert f"server.port {port} cannot be listened on" in capsys.readouterr().err


def test_help_and_schema(capsys: pytest.CaptureFixture[str]):
    assert main(["label", "--help"]) == 0
    assert "--server.allowed_hosts" in capsys.readouterr().out
    assert main(["label", "export", "--help"]) == 0
    capsys.readouterr()
    assert main(["schema", "label"]) == 0
    assert "guidelines" in json.loads(capsys.readouterr().out)["properties"]


def test_names_of_the_server():
    assert server.hosts_of(LabelServer()) == ["127.0.0.1", "127.0.0.1", "localhost", "::1"]
    assert server.hosts_of(LabelServer(host="10.0.0.5", allowed_hosts=("labels.example",))) == [
        "10.0.0.5",
        "labels.example",
    ]
    assert "evil.example" not in server.hosts_of(LabelServer(host="0.0.0.0", allowed_hosts=("labels.example",)))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("plain", [("text", "", "plain")]),
        ("a\n```python\n x\n```\nb", [("text", "", "a\n"), ("code", "python", " x\n"), ("text", "", "b")]),
        ("```\nx", [("text", "", "```\nx")]),
        ("~~~\n```\n~~~", [("code", "", "```\n")]),
        ("````\n```\nx\n```\n````\n", [("code", "", "```\nx\n```\n")]),
        ("inline ``` is text", [("text", "", "inline ``` is text")]),
    ],
)
def test_code_is_told_from_text(text: str, found: list[tuple[str, str, str]]):
    assert list(parts(text)) == found


def test_the_recipe_is_a_configuration(monkeypatch: pytest.MonkeyPatch):
    from rlhf_dist.config.load import load_config
    from rlhf_dist.curation.candidates import read_items
    from rlhf_dist.curation.config.label import LabelConfig

    monkeypatch.chdir(ROOT)
    config = load_config(LabelConfig, ROOT / "launch" / "recipes" / "label.yaml")
    assert config.out_dir.is_relative_to(Path("runs").absolute())
    assert len(read_items(config.sources)) >= 10


def test_the_page_shows_calls_and_results_of_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Element:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...
        def classes(self, _: str) -> Element:
            return self

        def props(self, _: str) -> Element:
            return self

    class Ui:
        @staticmethod
        def label(text: str) -> Element:
            shown.append(text)
            return Element()

        @staticmethod
        def element(_: str) -> Element:
            return Element()

    monkeypatch.setattr(texts, "ui", Ui)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "9 degrees"}]
    texts.show_messages(turns, roles=True)
    assert shown == ["Assistant", 'Tool call: weather({"city": "Ulm"})', "Tool", "9 degrees"]
