"""The documents say what is there: links, paths, layers, commands, example records and tables."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import get_args

import pytest
from support import planning_tables

from rlhf_dist.cli.main import OTHER_COMMANDS
from rlhf_dist.config.data import DataSource, RecordKind
from rlhf_dist.curation.candidates import read_items
from rlhf_dist.data.reader import read_preferences, read_prompts, read_sequences
from rlhf_dist.pipeline.arguments import CONFIG_COMMANDS
from rlhf_dist.run.metrics import METRICS, metrics_table

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(
        path
        for folder in ("rlhf_dist", "tests", "launch", "slurm", "ds_configs")
        for path in ROOT.glob(f"{folder}/**/*.md")
    ),
]
PACKAGE = ROOT / "rlhf_dist"
README = (ROOT / "README.md").read_text(encoding="utf-8")
DATA = (PACKAGE / "data" / "README.md").read_text(encoding="utf-8")
READERS = {
    "instruction": read_sequences,
    "messages": read_sequences,
    "text": read_sequences,
    "preference": lambda source: list(read_preferences(source, seed=0)),
    "ratings": lambda source: list(read_preferences(source, seed=0)),
    "prompt": read_prompts,
    "candidates": lambda source: read_items([source]),
}


def examples() -> dict[str, str]:
    """Kind → the example lines below the paragraph that its name begins."""
    return dict(re.findall(r"^`(\w+)`, for [^`]*(?:`[^`]*`[^`]*)*?```jsonl\n(.*?)```", DATA, re.DOTALL | re.MULTILINE))


def test_every_kind_of_record_has_an_example():
    assert examples().keys() == set(get_args(RecordKind)) == READERS.keys()


@pytest.mark.parametrize("kind", READERS)
def test_the_example_records_can_be_read(kind: RecordKind, tmp_path: Path):
    path = tmp_path / "records.jsonl"
    path.write_text(examples()[kind], encoding="utf-8")
    assert READERS[kind](DataSource(path=str(path), kind=kind))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (document.parent / target).exists(), f"{document}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_in_the_text_exist(document: Path):
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:rlhf_dist|tests|launch|slurm|ds_configs|\.ci)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{document}: {name}"


def test_paths_of_the_architecture_exist():
    """There, paths are relative to the package."""
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(\w+/[\w./]*)`", text):
        assert (PACKAGE / name).exists() or name in ("model/",), name


def test_the_house_names_every_room():
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## The house") : text.index("What an algorithm's room holds")]
    for folder in (path.parent.name for path in PACKAGE.glob("*/__init__.py")):
        assert f"`{folder}`" in table, folder


def test_the_layers_are_those_of_the_contract():
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = ast.literal_eval(contract[contract.index("layers = [") + len("layers = ") :].split("]")[0] + "]")
    there = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {path.stem for path in PACKAGE.glob("*.py")}
    # An optional layer, in brackets, need not be there yet.
    shown = [
        " | ".join(name for name in map(str.strip, layer.split("|")) if name.strip("()") in there)
        .replace("(", "")
        .replace(")", "")
        for layer in layers
    ]
    assert "\n".join(f"    {layer}" for layer in shown) in (PACKAGE / "README.md").read_text(encoding="utf-8")


def test_every_command_is_named():
    for command in [*CONFIG_COMMANDS, *OTHER_COMMANDS]:
        assert f"`rlhf-dist {command}" in README, command


def test_metrics_that_the_text_names_are_in_the_table():
    text = (PACKAGE / "run" / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## What to look at first") : text.index("## The table")]
    named = set(re.findall(r"`((?:reward|kl|policy|value|rollout)/\w+)`", section))
    assert named
    assert named <= METRICS.keys()


def test_the_table_of_metrics_is_current():
    """Write it anew from `metrics_table()` when this fails."""
    text = (PACKAGE / "run" / "README.md").read_text(encoding="utf-8")
    assert text.split("<!-- metrics -->\n")[1] == metrics_table()


def test_the_plans_are_current(monkeypatch: pytest.MonkeyPatch):
    """Write them anew with `python tests/support/planning_tables.py` when this fails."""
    monkeypatch.chdir(ROOT)
    assert planning_tables.written(planning_tables.README.read_text(encoding="utf-8")) == planning_tables.section()


def test_every_formula_names_a_function():
    text = (PACKAGE / "ppo" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+(?:/\w+)*)\.(\w+)`", text)) - {
        (section, name)
        for section, name in re.findall(r"`(ppo|rollout)\.(\w+)`", text)  # of a configuration
    }
    named = {(module, name) for module, name in named if name not in ("py", "safetensors")}
    assert named
    for module, function in named:
        path = PACKAGE / f"{module}.py" if "/" in module else PACKAGE / "ppo" / f"{module}.py"
        text = path.read_text(encoding="utf-8")
        assert f"def {function}(" in text or f"class {function}" in text, f"{module}.{function}"
    losses = re.findall(r"^def (\w+)", (PACKAGE / "ppo" / "losses.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert {("losses", name) for name in losses if not name.startswith("_")} <= named


def test_the_example_records_are_json():
    for lines in examples().values():
        for line in lines.splitlines():
            assert isinstance(json.loads(line), dict)
