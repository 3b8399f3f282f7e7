"""Every command that reads people's data, over rows of anything under `on_bad_row: skip`: it ends with a result or an error in
plain words, and every file that it writes can be read.

The number of inputs is printed; 0 tracebacks is what the test asserts: what is no `RlhfDistError` would come out of `main`.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from support.rows import GOOD, rows_of
from support.scripted import ScriptedGenerator, made_up_tasks

from rlhf_dist.cli.main import main
from rlhf_dist.config.data_set import DataSet
from rlhf_dist.curation.commands import judge, responses, self_instruct
from rlhf_dist.curation.label import server
from rlhf_dist.curation.labeling import LabelTask
from rlhf_dist.data.splits import write_set

EXAMPLES = 20
Models = Mapping[str, Path]
Arguments = Callable[[dict[str, Any], Path, Models], list[str]]


def of_run(command: str, **sections: Any) -> Arguments:
    """`validate` of a training command; SOURCE stands for the source."""

    def arguments(source: dict[str, Any], folder: Path, models: Models) -> list[str]:
        text = json.dumps(sections).replace('"SOURCE"', json.dumps([source]))
        for name, model in models.items():
            text = text.replace(f'"{name}"', json.dumps(str(model)))
        config = json.loads(text)
        path = folder / "run.yaml"
        path.write_text(json.dumps({"run_dir": str(folder / "run"), **config}))
        return [*command.split(), str(path)]

    return arguments


def of_data(action: str, sources: str = "sources", **settings: Any) -> Arguments:
    """`data ACTION`, or `label`, which reads the key `sources`."""

    def arguments(source: dict[str, Any], folder: Path, models: Models) -> list[str]:
        path = folder / "action.yaml"
        path.write_text(json.dumps({"out_dir": str(folder / "out"), sources: [source], **settings}))
        return [*action.split(), str(path)]

    return arguments


MODEL, DATA = {"model_path": "MODEL"}, {"train": "SOURCE", "max_length_tokens": 64}
SFT = of_run("validate sft", model=MODEL, data=DATA, sft={"batch_size": 1})
INSPECT = of_run("data inspect sft", model=MODEL, data=DATA, sft={"batch_size": 1})
REWARD = of_run("validate reward", model=MODEL, data=DATA, reward={"batch_size": 1})
PPO = of_run(
    "validate ppo",
    policy=MODEL,
    reward={"model_path": "RM"},
    data={"prompts": "SOURCE", "max_length_tokens": 64},
    rollout={"max_response_tokens": 8},
    ppo={"num_iterations": 1, "prompts_per_iteration": 1, "mini_batch_size": 1},
)
EVAL = of_run(
    "validate eval",
    policy={"model_path": "MODEL"},
    data={"instructions": "SOURCE", "max_length_tokens": 64},
)
GENERATOR = {"model": "one", "sampling": {"max_response_tokens": 8}}
COMMANDS = {
    "validate sft, instruction": ("instruction", SFT),
    "validate sft, messages": ("messages", SFT),
    "validate reward, preference": ("preference", REWARD),
    "validate reward, ratings": ("ratings", REWARD),
    "validate eval": ("instruction", EVAL),
    "validate ppo": ("prompt", PPO),
    "validate ppo, messages": ("messages", PPO),
    "data inspect": ("messages", INSPECT),
    "data templates": ("instruction", of_data("data templates")),
    "data dedup": ("instruction", of_data("data dedup", num_processes=0)),
    "data dedup, messages": ("messages", of_data("data dedup", num_processes=0)),
    "data mix": ("instruction", of_data("data mix")),
    "data pairs": ("preference", of_data("data pairs")),
    "data responses": (
        "prompt",
        of_data("data responses", "prompts", generators=[GENERATOR, GENERATOR | {"model": "two"}]),
    ),
    "data judge": ("candidates", of_data("data judge", judge=GENERATOR)),
    "data self-instruct": (
        "instruction",
        of_data("data self-instruct", "seeds", generator=GENERATOR, num_records=3, max_requests=4, seed_examples=1),
    ),
    "label": ("candidates", of_data("label")),
    "label report": ("candidates", of_data("label report")),
    "label export": ("candidates", of_data("label export")),
}


def judged_by_one(task: LabelTask, _: Path) -> None:
    """In place of the page: one annotator prefers the response on the left, then ends the server."""
    while (shown := task.current("ada")) is not None:
        task.judge("ada", shown, "a")


def check_json_lines(files: list[Path]) -> None:
    """Each line is JSON as everyone reads it: UTF-8, no bare NaN."""
    for file in files:
        text = file.read_text(encoding="utf-8")
        for line in text.removesuffix("\n").split("\n") if text else ():
            json.loads(line, parse_constant=lambda name: pytest.fail(f"a line has a bare {name}"))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(
    command: str,
    tiny_lm: Path,
    tiny_rm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    kind, arguments = COMMANDS[command]
    ended = []
    for module in (responses, self_instruct):
        monkeypatch.setattr(module, "load_generator", lambda *_: ScriptedGenerator(made_up_tasks))
    answers = itertools.cycle(["[[A]]", "[[B]]"])  # of a pair in both orders: the same response
    monkeypatch.setattr(judge, "load_generator", lambda *_: ScriptedGenerator(lambda _: next(answers)))
    monkeypatch.setattr(server, "serve_page", judged_by_one)

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(rows_of(kind))
    def run(rows: list[Any]) -> None:
        folder = tmp_path / str(len(ended))
        folder.mkdir()
        path = folder / "rows.jsonl"
        good = [GOOD[kind], {"response": "better", "rating": 5}] if kind == "ratings" else [GOOD[kind]]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *good]), encoding="utf-8")
        source: dict[str, Any] = {"path": str(path), "kind": kind, "on_bad_row": "skip"}
        if command == "data templates":
            template = "templates:\n- {name: a, instruction: '{{ instruction }}', output: '{{ output }}'}\n"
            (folder / "t.yaml").write_text(template)
            source["templates"] = {"path": str(folder / "t.yaml")}
        given = arguments(source, folder, {"MODEL": tiny_lm, "RM": tiny_rm})
        if command in ("label report", "label export"):
            main(["label", given[-1]])
        ended.append(main(given))
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        assert ended[-1] == 0 or said.err.strip()
        check_json_lines([file for file in folder.rglob("*.jsonl*") if file != path])
        shutil.rmtree(folder)

    run()
    assert 0 in ended  # the row that is good is enough
    with capsys.disabled():
        print(f" [{command}: {len(ended)} files of rows, {ended.count(0)} with a result, 0 tracebacks]", end="")


@pytest.mark.parametrize("kind", sorted(GOOD))
def test_sets_of_a_pipeline(kind: Any, tmp_path: Path):
    number = 0

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(rows_of(kind))
    def run(rows: list[Any]) -> None:
        nonlocal number
        number += 1
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, GOOD[kind]]), encoding="utf-8")
        source = {"path": str(path), "kind": kind, "on_bad_row": "skip"}
        folder = tmp_path / str(number)
        # The row that is good is enough.
        made = write_set(DataSet.model_validate({"name": "s", "sources": [source]}), 0, folder)
        files = [folder / file for file in made.files[""]]
        assert sum(file.read_bytes().count(b"\n") for file in files) == made.num_records
        check_json_lines(files)

    run()
