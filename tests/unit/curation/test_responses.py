"""Several responses to each prompt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from pydantic import ValidationError
from support.scripted import ScriptedGenerator

from rlhf_dist.config.data import DataSource
from rlhf_dist.core.errors import ConfigError, DataError, ModelError
from rlhf_dist.curation.candidates import read_items
from rlhf_dist.curation.commands import responses as command
from rlhf_dist.curation.config.generator import GeneratorConfig
from rlhf_dist.curation.config.responses import ResponsesConfig
from rlhf_dist.curation.generators import Completion, Request
from rlhf_dist.curation.responses import Responses, prompts_of_rows
from rlhf_dist.curation.resumable import work_folder

SAMPLING = {"max_response_tokens": 12, "temperature": 1.0}


def config(folder: Path, questions: list[Any] | int = 10, **settings: Any) -> ResponsesConfig:
    source = folder / "prompts.jsonl"
    wanted = [f"Question {n}?" for n in range(questions)] if isinstance(questions, int) else questions
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in wanted))
    generators = [
        {"model": "one", "batch_size": 4, "num_responses": 2, "sampling": SAMPLING},
        {"model": "two", "batch_size": 3, "sampling": SAMPLING},
    ]
    values = {"out_dir": folder / "out", "prompts": [{"path": str(source), "kind": "prompt"}], "generators": generators}
    return ResponsesConfig.model_validate(values | settings)


Answer = Callable[[str, Request], "str | Completion"]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], dict[str, ScriptedGenerator]]:
    """Every model is scripted: what it answers is a function of its name and the request."""

    def install(answer: Answer) -> dict[str, ScriptedGenerator]:
        made: dict[str, ScriptedGenerator] = {}

        def load(settings: GeneratorConfig, _: int) -> ScriptedGenerator:
            assert all(generator.closed for generator in made.values()), "two models in memory"
            generator = ScriptedGenerator(lambda request: answer(settings.model, request))
            generator.asked = made[settings.model].asked if settings.model in made else []
            return made.setdefault(settings.model, generator) if settings.model not in made else generator

        monkeypatch.setattr(command, "load_generator", load)
        return made

    return install


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def by_key(model: str, request: Request) -> str:
    return f" {model} says {request.key}\n"


def test_each_prompt_is_answered_by_each_model(tmp_path: Path, answering: Any) -> None:
    made = answering(by_key)
    command.run(settings := config(tmp_path, 30))
    records = rows_of(settings.out_dir / "records.jsonl")
    assert [record["prompt"] for record in records] == [f"Question {n}?" for n in range(30)]
    for record in records:
        assert Counter(c["model"] for c in record["candidates"]) == {"one": 2, "two": 1}
        assert sorted(c["drawn"] for c in record["candidates"]) == [0, 1, 2]
        assert all((c["drawn"] == 2) == (c["model"] == "two") for c in record["candidates"])
        assert all(c["text"].startswith(f"{c['model']} says ") for c in record["candidates"])
        assert all(c["sampling"]["max_response_tokens"] == 12 for c in record["candidates"])
    # What was drawn first stands anywhere: of 30 prompts, 10 in each place on average.
    places = Counter(next(i for i, c in enumerate(r["candidates"]) if c["model"] == "two") for r in records)
    assert all(3 <= places[place] <= 18 for place in range(3))
    # They are what the labeling page and judges read, and their ids are those that these work out.
    items = read_items([DataSource(path=str(settings.out_dir / "records.jsonl"), kind="candidates")])
    assert [item.id for item in items] == [record["id"] for record in records]
    assert {len(g.asked) for g in made.values()} == {60, 30}
    assert not work_folder(settings.out_dir).exists()
    asked = [request.key for generator in made.values() for request in generator.asked]
    assert len(set(asked)) == 90


def test_a_response_does_not_depend_on_the_other_prompts(tmp_path: Path, answering: Any) -> None:
    answering(by_key)
    found = []
    for name, prompts in (("a", ["x", "y", "z"]), ("b", ["w", "z", "y"])):
        (tmp_path / name).mkdir()
        command.run(settings := config(tmp_path / name, prompts))
        records = rows_of(settings.out_dir / "records.jsonl")
        found.append({r["prompt"]: (r["id"], r["candidates"]) for r in records})
    assert found[0]["y"] == found[1]["y"]
    assert found[0]["z"] == found[1]["z"]


def test_equal_and_empty_responses_are_drawn_anew(tmp_path: Path, answering: Any) -> None:
    seen: Counter[str] = Counter()

    def answer(model: str, request: Request) -> str:
        question = request.prompt[0]["content"]  # pyright: ignore
        seen[question + model] += 1
        first = seen[question + model] <= (2 if model == "one" else 1)
        if question == "same":
            return "same" if first else f"other {request.key}"
        if question == "always":
            return "same"
        return "" if question == "empty" and model == "two" and first else by_key(model, request)

    answering(answer)
    command.run(settings := config(tmp_path, ["same", "always", "empty", "fine"]))
    report = json.loads((settings.out_dir / "report.json").read_text())
    records = {r["prompt"]: [c["text"] for c in r["candidates"]] for r in rows_of(settings.out_dir / "records.jsonl")}
    assert records.keys() == {"same", "empty", "fine"}
    assert all(len(set(texts)) == 3 for texts in records.values())
    assert "same" in records["same"]  # the first of equal ones stays
    assert "" not in records["empty"]
    [skipped] = rows_of(settings.out_dir / "skipped.jsonl")
    assert (skipped["prompt"], skipped["responses"]) == ("always", ["same"] * 3)
    assert (report["requests"], report["redrawn"], report["skipped_prompts"]) == (12 + 2 + 2 + 1, 5, 1)
    one, two = report["by_generator"]
    assert (one["kept"], one["equal"], two["kept"], two["equal"]) == (7, 1, 3, 1)


def test_a_prompt_that_a_model_cannot_take_costs_that_response(tmp_path: Path, answering: Any) -> None:
    def answer(model: str, request: Request) -> str | Completion:
        if model == "two" and request.prompt[0]["content"] == "Question 3?":  # pyright: ignore
            return Completion.failed("too long")
        return Completion(by_key(model, request), "length" if model == "two" else "eos")

    answering(answer)
    command.run(settings := config(tmp_path, 4))
    records = rows_of(settings.out_dir / "records.jsonl")
    assert [len(r["candidates"]) for r in records] == [3, 3, 3, 2]
    report = json.loads((settings.out_dir / "report.json").read_text())
    assert report["by_generator"][1].items() >= {"kept": 3, "failed": 1, "cut_off": 3}.items()


def test_duplicates_may_be_kept(tmp_path: Path, answering: Any) -> None:
    answering(lambda model, _: "yes" if model == "one" else "no")
    command.run(settings := config(tmp_path, 2, duplicates="keep", max_redraws=0))
    texts = [sorted(c["text"] for c in r["candidates"]) for r in rows_of(settings.out_dir / "records.jsonl")]
    assert texts == [["no", "yes", "yes"]] * 2


def test_nothing_to_choose_among_is_an_error_that_says_so(tmp_path: Path, answering: Any) -> None:
    answering(lambda *_: "yes")
    with pytest.raises(DataError, match="no prompt of 2 got two different responses"):
        command.run(config(tmp_path, 2))


def test_repeated_prompts_are_answered_once_and_bad_rows_skipped(tmp_path: Path, answering: Any) -> None:
    made = answering(by_key)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    settings = config(tmp_path, ["a", "b", "a", chat, 7])
    source = settings.prompts[0].model_copy(update={"on_bad_row": "skip"})
    command.run(settings.model_copy(update={"prompts": (source,)}))
    records = rows_of(settings.out_dir / "records.jsonl")
    assert [record["prompt"] for record in records] == ["a", "b", chat]
    assert made["two"].asked[2].prompt == tuple(chat)
    report = json.loads((settings.out_dir / "report.json").read_text())
    assert (report["prompts"], report["repeated_prompts"], report["bad"]) == (3, 1, 1)
    assert "prompts.jsonl:5" in rows_of(settings.out_dir / "bad_rows.jsonl")[0]["reason"]


@pytest.mark.parametrize("stops_at", [1, 5, 9, 10])
def test_interrupted_and_given_again_it_ends_as_if_undisturbed(stops_at: int, tmp_path: Path, answering: Any) -> None:
    """At a batch of the first model, of the second, and among those drawn anew."""

    def answer(model: str, request: Request) -> str:  # every third response is "dull", so some are drawn anew
        return "dull" if request.key % 3 == 0 else by_key(model, request)

    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    answering(answer)
    command.run(whole := config(tmp_path / "whole", 10, max_redraws=3))
    total = len(rows_of(whole.out_dir / "completions.jsonl")) - 1
    assert total > 10
    calls = 0

    def failing(model: str, request: Request) -> str:
        nonlocal calls
        calls += 1
        if len(list(work.open("rb"))) > stops_at:
            raise ModelError("gone")
        return answer(model, request)

    answering(failing)
    settings = config(tmp_path / "broken", 10, max_redraws=3)
    work = work_folder(settings.out_dir) / "journal.jsonl"
    with pytest.raises(ModelError, match="gone"):
        command.run(settings)
    assert not settings.out_dir.exists()
    made = answering(answer)
    command.run(settings)
    assert sum(len(generator.asked) for generator in made.values()) < calls + 60
    for name in ("records.jsonl", "report.json", "completions.jsonl"):
        ours, theirs = ((c.out_dir / name).read_text() for c in (settings, whole))
        assert ours.replace("/broken/", "/whole/") == theirs


def test_half_done_work_of_another_configuration_is_not_taken_over(tmp_path: Path, answering: Any) -> None:
    def failing(model: str, request: Request) -> str:
        if model == "two":
            raise ModelError("gone")
        return by_key(model, request)

    answering(failing)
    with pytest.raises(ModelError, match="gone"):
        command.run(config(tmp_path))
    with pytest.raises(ConfigError, match="max_redraws was 1 and is 2"):
        command.run(config(tmp_path, max_redraws=2))
    with pytest.raises(ConfigError, match=r"prompts was .* and is"):
        command.run(config(tmp_path, 9))


def test_prompts_of_a_datasets_dataset(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}])
    prompts = prompts_of_rows(rows)
    assert [p.messages for p in prompts] == [({"role": "user", "content": text},) for text in "ab"]
    state = Responses(config(tmp_path), prompts)
    for piece in state.pieces():
        state.absorb(
            piece, [Completion(f"{piece.generator} {request.key}", "eos") for request in state.requests(piece)]
        )
    assert len(list(state.records())) == 2
    with pytest.raises(DataError, match="row 2: no prompt"):
        prompts_of_rows([{"prompt": "a"}, {"prompt": " "}])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"generators": [{"model": "one"}]}, "one response to a prompt, and a choice needs two"),
        ({"generators": [{"model": "a", "num_responses": 2, "sampling": {"temperature": 0}}]}, "at temperature 0"),
        ({"prompts": [{"path": "a.txt", "kind": "text"}]}, "holds no prompts"),
    ],
)
def test_rejections(settings: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=problem):
        config(tmp_path, **settings)


def test_with_real_models(tiny_lm: Path, tmp_path: Path) -> None:
    """One model under two sampling settings, from the file to the candidates."""
    base = {"model": str(tiny_lm), "precision": "fp32", "device": "cpu", "batch_size": 3}
    generators = [base | {"name": "cool", "sampling": {"max_response_tokens": 6, "temperature": 0.5}}]
    generators += [
        base | {"name": "hot", "num_responses": 2, "sampling": {"max_response_tokens": 6, "temperature": 1.5}}
    ]
    command.run(settings := config(tmp_path, ["calm", "kind", "cool", "crime"], generators=generators))
    records = rows_of(settings.out_dir / "records.jsonl")
    assert len(records) == 4
    assert {c["model"] for r in records for c in r["candidates"]} == {"cool", "hot"}
    again = settings.model_copy(update={"out_dir": tmp_path / "again"})
    command.run(again)
    assert (again.out_dir / "records.jsonl").read_bytes() == (settings.out_dir / "records.jsonl").read_bytes()


def test_prompts_that_differ_in_their_tools_are_different_and_are_asked_with_them(
    tmp_path: Path, answering: Callable[[Answer], dict[str, ScriptedGenerator]]
) -> None:
    made = answering(lambda model, request: f"{model} {request.key}")
    tools = [[], [{"name": "weather"}], [{"name": "clock"}], [{"name": "weather"}]]
    settings = config(tmp_path, ["What now?"])
    Path(settings.prompts[0].path).write_text(
        "".join(json.dumps({"prompt": "What now?"} | ({"tools": t} if t else {})) + "\n" for t in tools)
    )
    command.run(settings)
    rows = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert [row.get("tools", []) for row in rows] == tools[:3]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["repeated_prompts"] == 1
    asked = [list(request.tools) for request in made["two"].asked]
    assert asked == tools[:3]
    items = read_items([DataSource(path=str(tmp_path / "out" / "records.jsonl"), kind="candidates")])
    assert [(item.id, list(item.tools)) for item in items] == [(row["id"], row.get("tools", [])) for row in rows]
