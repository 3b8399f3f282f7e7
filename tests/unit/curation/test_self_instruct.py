"""Self-instruct: reading completions, the rules, and a whole run with a scripted generator."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from pydantic import ValidationError
from support.scripted import ScriptedGenerator, made_up_tasks

from rlhf_dist.config.data import DataSource
from rlhf_dist.core.errors import ConfigError, DataError, ModelError, RunFolderError
from rlhf_dist.curation.commands import self_instruct as command
from rlhf_dist.curation.config.self_instruct import Rule, SelfInstructConfig, TaskFilters, TaskFormat
from rlhf_dist.curation.generators import Completion
from rlhf_dist.curation.prompts import PromptTemplate
from rlhf_dist.curation.resumable import work_folder
from rlhf_dist.curation.rouge import rouge_l, rouge_tokens
from rlhf_dist.curation.self_instruct import PROMPT, SelfInstruct, seed_tasks
from rlhf_dist.curation.task_filters import TaskFilter
from rlhf_dist.curation.task_parsing import Task, TaskParser
from rlhf_dist.data.reader import read_sequences
from rlhf_dist.data.records import Conversation

SEEDS = [
    {"instruction": "Name three cities by the sea.", "input": "", "output": "Lisbon, Osaka and Perth."},
    {"instruction": "Say the opposite of the word.", "input": "warm", "output": "cold"},
    {"instruction": "How many legs does a spider have?", "input": "", "output": "Eight."},
    {"instruction": "Put this into the past tense.", "input": "She sings.", "output": "She sang."},
]

# Reading


def test_seeds_have_no_system_message_and_no_history() -> None:
    assert seed_tasks([seed | {"system": "s"} for seed in SEEDS]) == seed_tasks(SEEDS)
    with pytest.raises(DataError, match="seed 1: field 'history' has 3 turns; give"):
        seed_tasks([SEEDS[0] | {"history": [["u", "a"]]}])


def parsed(text: str, reason: Any = "eos") -> tuple[list[tuple[str, str, str]], int, int]:
    found = TaskParser(TaskFormat()).parse(Completion(text, reason))
    return [(t.instruction, t.input, t.output) for t in found.tasks], found.num_malformed, found.num_unfinished


def test_a_completion_goes_on_where_the_prompt_ends() -> None:
    text = (
        " Name a bird.\n4. Input:\n<noinput>\n4. Output:\nA wren.\n\n###\n"
        "5. Instruction: Sort these.\n5. Input: 3, 1,\n2\n5. Output:\n1, 2,\n3\n###"
    )
    assert parsed(text) == ([("Name a bird.", "", "A wren."), ("Sort these.", "3, 1,\n2", "1, 2,\n3")], 0, 0)


@pytest.mark.parametrize(
    "text",
    [
        "4. Instruction: Name a bird.\n4. Input:\n<noinput>\n4. Output:\nA wren.",
        "Sure! Here are the tasks:\n\n**4. Instruction:** Name a bird.\n**Input:** <NoInput>\n**Output:** A wren.",
        "Instructions: Name a bird.\nOutput: A wren.",
        "### Instruction:\nName a bird.\n\n### Input:\nnoinput.\n\n### Output:\nA wren.\n---",
        "Task 4) instruction: Name a bird.\ninput:\n\noutput: A wren.",
    ],
)
def test_models_write_headings_in_many_ways(text: str) -> None:
    assert parsed(text) == ([("Name a bird.", "", "A wren.")], 0, 0)


def test_a_malformed_piece_costs_that_piece() -> None:
    good = "Instruction: Name a bird.\nOutput: A wren.\n"
    for bad in (
        "Instruction: no output\n",
        "Instruction: two\nOutput: one\nOutput: two\n",
        "Instruction: turned\nOutput: one\nInput: two\n",
    ):
        assert parsed(good + bad + good) == ([("Name a bird.", "", "A wren.")] * 2, 1, 0)
    assert parsed("I cannot help with that.") == ([], 1, 0)
    assert parsed("") == parsed("\n###\n") == ([], 0, 0)


def test_what_was_cut_off_is_skipped() -> None:
    good = "Instruction: Name a bird.\nOutput: A wren.\n"
    assert parsed(good + "Instruction: Name a fish.\nOutput: A sal", "length") == (
        [("Name a bird.", "", "A wren.")],
        0,
        1,
    )
    assert parsed("Name a fish and", "length") == ([], 0, 1)


def test_headings_of_another_language() -> None:
    form = TaskFormat(instruction="Anweisung", input="Eingabe", output="Ausgabe", no_input="<keine>")
    found = TaskParser(form).parse(Completion("Nenne.\nEingabe: keine\nAusgabe: Instruction: so", "eos"))
    assert found.tasks == [Task("Nenne.", "", "Instruction: so")]
    with pytest.raises(ValidationError, match="cannot be told apart"):
        TaskFormat(input="instruction ")


# The rules


def rule_of(
    instruction: str = "Name a small bird.", given: str = "", output: str = "A wren.", **filters: Any
) -> Rule | None:
    found = TaskFilter(TaskFilters(**filters), TaskFormat()).rejection(Task(instruction, given, output))
    return found.rule if found else None


@pytest.mark.parametrize(
    ("rule", "task"),
    [
        (None, {}),
        ("instruction_too_short", {"instruction": "Name birds"}),
        (None, {"instruction": "Name three birds"}),
        ("instruction_too_long", {"instruction": "word " * 151}),
        (None, {"instruction": "word " * 150}),
        ("input_too_long", {"given": "word " * 101}),
        ("output_too_long", {"output": "word " * 101}),
        (None, {"output": " ".join(f"w{n}" for n in range(100))}),
        ("starts_with_punctuation", {"instruction": "- name a small bird"}),
        ("starts_with_punctuation", {"instruction": "«Name» a small bird"}),
        ("starts_with_non_ascii", {"instruction": "Übersetze das in Prosa."}),
        ("non_text_task", {"instruction": "Look at the Picture and say who it is."}),
        ("non_text_task", {"instruction": "Please go to the shop."}),
        (None, {"instruction": "Say what a mapping or a profile is."}),
        ("forbidden_start", {"instruction": "Write a program that sorts."}),
        (None, {"instruction": "How do I write a program?"}),
        ("no_output", {"output": " "}),
        ("output_repeats", {"given": "a wren", "output": "A  wren"}),
        ("output_repeats", {"output": "Name a small bird."}),
        ("input_repeats", {"given": "name a small BIRD."}),
        ("repeats_itself", {"output": "a b c d e " + "so " * 10}),  # of 13 runs "so so so" comes 8 times: 7/13 repeated
        (None, {"output": "so " * 11}),
        (None, {"output": "- " + "\n- ".join(f"bird {n}" for n in range(30))}),
        ("ends_with_colon", {"output": "The bird is:"}),
        ("ends_with_colon", {"given": "These are:"}),
        ("marker_left", {"output": "A wren. <noinput>"}),
        ("marker_left", {"output": "A wren.\n### More"}),
    ],
)
def test_a_rule(rule: Rule | None, task: dict[str, str]) -> None:
    assert rule_of(**task) == rule
    if rule is not None:
        assert rule_of(**task, disabled=(rule,)) != rule


def test_rules_take_settings() -> None:
    assert rule_of("Name a wren, please.", forbidden_words=("wren",)) == "forbidden_word"
    assert rule_of("Look at the picture there.", non_text_words=()) is None
    assert rule_of("Name a bird.", min_instruction_words=4) == "instruction_too_short"
    with pytest.raises(ValidationError, match="an empty word"):
        TaskFilters(forbidden_words=(" ",))


def test_too_similar_names_the_nearest() -> None:
    rules = TaskFilter(TaskFilters(), TaskFormat())
    rules.keep("Name three cities by the sea.")
    rules.keep("Name three rivers by the sea.")
    # 5 of 6 and 6 tokens: 10/12; of the first only 4: 8/12.
    found = rules.rejection(Task("Name three rivers by a sea!", "", "x"))
    assert found == ("too_similar", "Name three rivers by the sea.", round(10 / 12, 4))
    assert rules.rejection(Task("Name two rivers near a sea.", "", "x")) is None  # 3 of 6 and 6: 0.5


# A run


def config(folder: Path, **settings: Any) -> SelfInstructConfig:
    seeds = folder / "seeds.jsonl"
    seeds.write_text("".join(json.dumps(seed) + "\n" for seed in SEEDS))
    generator = {"model": "scripted", "batch_size": 4} | settings.pop("generator", {})
    return SelfInstructConfig(
        **{"out_dir": folder / "out", "seeds": (DataSource(path=str(seeds), kind="instruction"),), "num_records": 60}
        | settings,
        generator=generator,  # pyright: ignore[reportArgumentType]
    )


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> ScriptedGenerator:
    generator = ScriptedGenerator(made_up_tasks)
    monkeypatch.setattr(command, "load_generator", lambda *_: generator)
    return generator


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_run(scripted: ScriptedGenerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(tmp_path)
    command.run(settings)
    out = settings.out_dir
    records, rejected, report = rows_of(out / "records.jsonl"), rows_of(out / "rejected.jsonl"), None
    report = json.loads((out / "report.json").read_text())
    assert len(records) == report["records"] == report["kept"] == 60
    assert report["stopped_by"] == "num_records"
    assert not work_folder(out).exists()
    assert scripted.closed
    # Every task that was written is accounted for, by a count made here.
    answers = [made_up_tasks(request) for request in scripted.asked]
    assert report["requests"] == len(answers)
    assert report["failed_requests"] == sum(isinstance(a, Completion) and a.finish_reason == "error" for a in answers)
    texts = [a if isinstance(a, str) else a.text for a in answers]
    assert report["malformed"] + report["unfinished"] + report["parsed"] == sum(
        text.count("Output:") or (1 if text else 0) for text in texts
    )
    assert report["parsed"] == len(records) + len(rejected) + report["surplus"]
    assert report["rejected"] == Counter(row["rule"] for row in rejected)
    assert report["rejected"].keys() >= {"too_similar", "non_text_task"}
    # No two kept instructions, and no kept one and a seed, are too similar; what was rejected was.
    kept = [rouge_tokens(row["instruction"]) for row in [*SEEDS, *records]]
    assert max(rouge_l(a, b) for i, a in enumerate(kept) for b in kept[:i]) <= 0.7
    for row in rejected:
        if row["rule"] == "too_similar":
            assert (
                row["similarity"]
                == round(rouge_l(rouge_tokens(row["instruction"]), rouge_tokens(row["detail"])), 4)
                > 0.7
            )
    # The nearest neighbors told are the nearest (all are in the sample here).
    own = [max(rouge_l(a, b) for j, b in enumerate(kept) if j != i) for i, a in enumerate(kept)][len(SEEDS) :]
    assert report["nearest"]["sampled"] == 60
    assert report["nearest"]["max"] == pytest.approx(max(own), abs=1e-4)
    assert report["nearest"]["mean"] == pytest.approx(sum(own) / 60, abs=1e-4)
    # Where a record came from.
    first = records[0]
    written = texts[first["provenance"]["request"]]
    assert first["instruction"] in written
    assert first["provenance"]["model"] == "scripted"
    shown = scripted.asked[first["provenance"]["request"]].prompt[0]["content"]  # pyright: ignore
    assert [seed["instruction"] in shown for seed in SEEDS] == [i in first["provenance"]["seeds"] for i in range(4)]
    # What it is for: a trainer reads it.
    read = list(read_sequences(DataSource(path=str(out / "records.jsonl"), kind="instruction")))
    assert len(read) == 60
    assert isinstance(read[0], Conversation)
    assert len(rows_of(out / "completions.jsonl")) == 1 + len(answers) / 4
    assert "records kept" in capsys.readouterr().out


def test_the_prompt_says_what_is_wanted(scripted: ScriptedGenerator, tmp_path: Path) -> None:
    command.run(config(tmp_path, max_requests=2, tasks_per_request=5, filters={"max_output_words": 42}))
    assert len(scripted.asked) == 2
    [message] = scripted.asked[0].prompt
    prompt = message["content"]  # pyright: ignore
    assert "a set of 8 diverse tasks" in prompt
    assert "less than 42 words" in prompt
    assert prompt.endswith("###\n4. Instruction:")
    assert "2. Input:\n<noinput>\n" in prompt or "1. Input:\n<noinput>\n" in prompt
    assert scripted.asked[0].prompt != scripted.asked[1].prompt


def test_a_prompt_of_ones_own_and_kept_examples(scripted: ScriptedGenerator, tmp_path: Path) -> None:
    (tmp_path / "p.jinja").write_text(
        "{% for e in examples %}[{{ e.instruction }}]{% endfor %} continue from {{ first }}:"
    )
    settings = config(tmp_path, prompt_path=tmp_path / "p.jinja", ask="text", kept_examples=2, num_records=20)
    command.run(settings)
    kept = [row["instruction"] for row in rows_of(settings.out_dir / "records.jsonl")]
    prompts = [request.prompt for request in scripted.asked]
    assert str(prompts[0]).endswith("continue from 4:")
    assert str(prompts[-1]).endswith("continue from 6:")
    assert sum(f"[{text}]" in str(prompts[-1]) for text in kept) == 2


def test_the_cap_ends_a_run_that_keeps_too_little(
    scripted: ScriptedGenerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, num_records=10_000, max_requests=6)
    command.run(settings)
    report = json.loads((settings.out_dir / "report.json").read_text())
    assert (report["requests"], report["stopped_by"], report["wanted"]) == (6, "max_requests", 10_000)
    assert [request.key for request in scripted.asked] == list(range(6))
    assert "Stopped at max_requests 6" in capsys.readouterr().out


def test_without_a_record_the_account_is_written_and_the_command_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "load_generator", lambda *_: ScriptedGenerator(lambda _: "Hello."))
    settings = config(tmp_path, max_requests=5)
    with pytest.raises(DataError, match="no record was kept of 0 tasks in 5 completions"):
        command.run(settings)
    report = json.loads((settings.out_dir / "report.json").read_text())
    assert (report["malformed"], report["without_tasks"], report["records"]) == (5, 5, 0)


def test_seeds_of_a_datasets_dataset() -> None:
    assert seed_tasks(datasets.Dataset.from_list(SEEDS)) == [Task(**seed) for seed in SEEDS]
    with pytest.raises(DataError, match="seed 2: field 'output' is missing"):
        seed_tasks([SEEDS[0], {"instruction": "x"}])


def test_seeds_with_a_completion() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert seed_tasks([{"prompt": "Name a bird.", "completion": "Wren"}]) == [Task("Name a bird.", "", "Wren")]
    with pytest.raises(DataError, match="seed 1: field 'prompt' has 3 turns"):
        seed_tasks([{"prompt": turns, "completion": "Wren"}])


def test_long_seeds_are_not_shown_but_count(tmp_path: Path) -> None:
    settings = config(tmp_path, max_example_words=8, seed_examples=2)
    state = SelfInstruct(settings, seed_tasks(SEEDS), PromptTemplate(None, PROMPT))
    assert state.shown == [1, 2]
    state.absorb([Completion("Name three cities by the sea!\nOutput: Oslo.", "eos")])
    assert state.report.rejected == {"too_similar": 1}
    with pytest.raises(ConfigError, match=r"only 2 of 4 seeds can be shown \(max_example_words is 8\)"):
        SelfInstruct(config(tmp_path, max_example_words=8), seed_tasks(SEEDS), PromptTemplate(None, PROMPT))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{% for %}", r"TemplateSyntaxError.*in line 1"),
        ("{{ exmples }}", r"'exmples' is undefined; it is given examples, num_tasks"),
        ("{{ examples.__class__.__mro__ }}", "SecurityError"),
        ("{% include 'x' %}", "no loader"),
        ("{% if num_tasks < 0 %}x{% endif %}", "comes out empty"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_rejected_before_a_model_is_loaded(
    text: str, problem: str, scripted: ScriptedGenerator, tmp_path: Path
) -> None:
    (tmp_path / "p.jinja").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        command.run(config(tmp_path, prompt_path=tmp_path / "p.jinja"))
    assert not scripted.asked
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jinja", "seeds.jsonl"]


# Interrupted

CHILD = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {unit!r}]
from support.scripted import ScriptedGenerator, made_up_tasks
from test_self_instruct import config
from rlhf_dist.curation.commands import self_instruct as command
command.load_generator = lambda *_: ScriptedGenerator(made_up_tasks, delay_s=0.05)
command.run(config(Path({folder!r}), kept_examples=2, seed=5))
"""


def test_killed_in_the_middle_and_given_again_it_ends_as_if_undisturbed(
    scripted: ScriptedGenerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    command.run(whole := config(tmp_path / "whole", kept_examples=2, seed=5))
    rounds = len(scripted.asked) / 4
    settings = config(tmp_path / "killed", kept_examples=2, seed=5)
    tests = Path(__file__).parents[2]
    code = CHILD.format(tests=str(tests), unit=str(Path(__file__).parent), folder=str(tmp_path / "killed"))
    journal = work_folder(settings.out_dir) / "journal.jsonl"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    done = journal.read_bytes().count(b"\n") - 1
    assert 3 <= done < rounds
    assert not settings.out_dir.exists()
    with journal.open("ab") as file:  # and its last line was torn
        file.write(b'{"completions": [{"te')
    scripted.asked.clear()
    capsys.readouterr()
    command.run(settings)
    assert [request.key for request in scripted.asked] == list(range(done * 4, int(rounds * 4)))
    assert f"continuing after {done * 4} requests" in capsys.readouterr().out
    for name in ("records.jsonl", "rejected.jsonl", "report.json"):
        assert (settings.out_dir / name).read_bytes() == (whole.out_dir / name).read_bytes()


def half_done(monkeypatch: pytest.MonkeyPatch, settings: SelfInstructConfig) -> None:
    """Three rounds, and then the endpoint fails."""

    def answer(request: Any) -> str | Completion:
        if request.key >= 12:
            raise ModelError("the endpoint does not answer")
        return made_up_tasks(request)

    monkeypatch.setattr(command, "load_generator", lambda *_: ScriptedGenerator(answer))
    with pytest.raises(ModelError, match="does not answer"):
        command.run(settings)


def test_half_done_work_of_another_configuration_is_not_taken_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    half_done(monkeypatch, config(tmp_path))
    for changed, said in (
        ({"generator": {"sampling": {"temperature": 0.5}}}, r"generator\.sampling\.temperature was 1\.0 and is 0\.5"),
        ({"filters": {"max_similarity": 0.6}}, r"filters\.max_similarity was 0\.7 and is 0\.6"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"tasks_per_request": 3}, "tasks_per_request was 10 and is 3"),
    ):
        with pytest.raises(ConfigError, match=said):
            command.run(config(tmp_path, **changed))  # pyright: ignore[reportArgumentType]
    changed_seeds = config(tmp_path)
    path = tmp_path / "seeds.jsonl"
    path.write_text(path.read_text().replace("Lisbon", "Genoa"))
    with pytest.raises(ConfigError, match=r"seeds was .* and is"):
        command.run(changed_seeds)


def test_a_start_that_failed_binds_to_nothing(
    monkeypatch: pytest.MonkeyPatch, scripted: ScriptedGenerator, tmp_path: Path
) -> None:
    """A wrong model name leaves nothing behind, and what a kill left before the first piece is begun anew."""

    def no_model(*_: Any) -> None:
        raise ModelError("no model 'worng'")

    with monkeypatch.context() as patched:
        patched.setattr(command, "load_generator", no_model)
        with pytest.raises(ModelError, match="worng"):
            command.run(config(tmp_path, generator={"model": "worng"}))
    settings = config(tmp_path)
    assert not work_folder(settings.out_dir).exists()
    work_folder(settings.out_dir).mkdir()
    (work_folder(settings.out_dir) / "journal.jsonl").write_text('{"work": {"generator": {"model": "worng"}}}\n')
    command.run(settings)
    identity, *_ = rows_of(settings.out_dir / "completions.jsonl")
    assert identity["work"]["generator"]["model"] == "scripted"


def test_when_to_stop_and_how_to_connect_may_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    endpoint = {"base_url": "http://127.0.0.1:1/v1", "api_key_env": None}
    half_done(monkeypatch, config(tmp_path, generator={"engine": "openai", "endpoint": endpoint}))
    generator = ScriptedGenerator(made_up_tasks)
    monkeypatch.setattr(command, "load_generator", lambda *_: generator)
    endpoint = {"base_url": "http://127.0.0.1:2/v1", "api_key_env": "OTHER", "max_retries": 9, "timeout_s": 1}
    settings = config(tmp_path, generator={"engine": "openai", "endpoint": endpoint}, num_records=20, max_requests=30)
    command.run(settings)
    assert len(rows_of(settings.out_dir / "records.jsonl")) == 20
    assert all(request.key >= 12 for request in generator.asked)


def test_an_earlier_result_stays(scripted: ScriptedGenerator, tmp_path: Path) -> None:
    command.run(config(tmp_path, num_records=5))
    before = (tmp_path / "out" / "records.jsonl").read_bytes()
    scripted.asked.clear()
    with pytest.raises(RunFolderError, match="--overwrite true"):
        command.run(config(tmp_path, num_records=6))
    assert not scripted.asked
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == before
    command.run(config(tmp_path, num_records=6, overwrite=True))
    assert len(rows_of(tmp_path / "out" / "records.jsonl")) == 6


def test_a_finished_result_goes_on_when_its_caps_are_raised(
    scripted: ScriptedGenerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(**settings: Any) -> list[int]:
        scripted.asked.clear()
        command.run(config(tmp_path, **settings))
        return [request.key for request in scripted.asked]

    assert asked(num_records=1000, max_requests=6) == list(range(6))
    assert "--overwrite true" in capsys.readouterr().out
    more = {"num_records": 1000, "max_requests": 12}
    assert asked(**more, overwrite=True) == list(range(6, 12))
    assert "continuing after 6 requests" in capsys.readouterr().out
    assert asked(**more, out_dir=tmp_path / "whole") == list(range(12))
    for name in ("records.jsonl", "rejected.jsonl", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # What was not taken when enough was kept is taken now.
    assert asked(num_records=3, max_requests=12, out_dir=tmp_path / "few") == list(range(4))
    assert asked(**more, out_dir=tmp_path / "few", overwrite=True) == list(range(4, 12))
    assert (tmp_path / "few" / "records.jsonl").read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()
    # The same command, another configuration and lowered caps begin anew.
    assert asked(**more, overwrite=True) == list(range(12))
    assert asked(num_records=1000, max_requests=13, seed=1, overwrite=True) == list(range(13))
    assert asked(num_records=1000, max_requests=5, seed=1, overwrite=True) == list(range(5))


@pytest.mark.slow
def test_with_a_real_model_and_the_real_seeds(shared_data: Path, tmp_path: Path) -> None:
    """SmolLM2-135M keeps little, and the account of what it wrote holds against its completions."""
    from rlhf_dist.quickstart.smollm2 import ensure_smollm2

    try:
        model = ensure_smollm2()
    except ModelError as error:
        pytest.skip(str(error))
    fields = {"input": "instances.0.input", "output": "instances.0.output"}
    seeds = DataSource(path=str(shared_data / "alpaca_seed_tasks.jsonl"), kind="instruction", fields=fields)
    settings = config(
        tmp_path,
        seeds=(seeds,),
        generator={
            "model": str(model),
            "device": "cpu",
            "precision": "fp32",
            "batch_size": 2,
            "sampling": {"max_response_tokens": 96, "temperature": 0.7, "top_p": 0.9},
        },
        max_requests=2,
        seed_examples=2,
        tasks_per_request=2,
        max_example_words=20,
    )
    with contextlib.suppress(DataError):  # it may keep nothing; the account is there all the same
        command.run(settings)
    report = json.loads((settings.out_dir / "report.json").read_text())
    records, rejected = (rows_of(settings.out_dir / name) for name in ("records.jsonl", "rejected.jsonl"))
    assert report["requests"] == 2
    assert report["response_tokens"] > 20
    assert report["parsed"] == len(records) + len(rejected)
    assert report["parsed"] + report["malformed"] + report["unfinished"] > 0
    [written] = rows_of(settings.out_dir / "completions.jsonl")[1:]
    for task in (*records, *rejected):
        where = task.get("provenance", task)["request"]
        assert task["output"].split("\n")[0] in written["completions"][where]["text"]
    kept = [row["instruction"] for row in records]
    seeds_too = [json.loads(line)["instruction"] for line in (shared_data / "alpaca_seed_tasks.jsonl").open()]
    for i, text in enumerate(kept):
        assert all(rouge_l(rouge_tokens(text), rouge_tokens(o)) <= 0.7 for o in seeds_too + kept[:i])
