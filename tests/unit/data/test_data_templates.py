from __future__ import annotations

import json
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.config.data import DataSource
from rlhf_dist.config.templates import Labels, TemplateSettings
from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.curation.templates import render_rows
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.reader import read_prompts, read_sequences
from rlhf_dist.data.records import Conversation

NAMES = Labels(names={"0": "negative", "1": "positive"})
ROWS = [{"text": f"text {n}", "label": n % 2} for n in range(8)]


def file(tmp_path: Path, text: str) -> TemplateSettings:
    path = tmp_path / "task.yaml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return TemplateSettings(path=path, per_row=None)


def one(tmp_path: Path, output: str = "{{ label }}", **more: str) -> TemplateSettings:
    fields = {"name": "t", "instruction": "Say: {{ text }}", "output": output} | more
    path = tmp_path / "task.yaml"
    path.write_text(json.dumps({"labels": {"names": {0: "negative", 1: "positive"}}, "templates": [fields]}))
    return TemplateSettings(path=path)


def test_rows_become_records_with_names_for_labels_and_provenance(tmp_path: Path) -> None:
    settings = file(
        tmp_path,
        """
        task: sentiment
        labels: {names: {0: negative, 1: positive}}
        templates:
          - {name: en, instruction: "Is it {{ choices | join(' or ') }}?", input: "{{ text }}", output: "{{ label }}"}
          - name: vi
            instruction: "Cảm xúc là gì: {{ choices | join(', ') }}?"
            input: "{{ text }}"
            output: "{{ label }}"
            labels: {negative: tiêu cực, positive: tích cực}
        """,
    )
    en, vi = render_rows([{"text": "Fine.", "label": 1}], settings)
    assert en["instruction"] == "Is it negative or positive?"
    assert (en["input"], en["output"], en["task"]) == ("Fine.", "positive", "sentiment")
    assert en["provenance"] == {"template": "en", "templates": "task.yaml", "row": "row 1"}
    assert (vi["instruction"], vi["output"]) == ("Cảm xúc là gì: tiêu cực, tích cực?", "tích cực")


@pytest.mark.parametrize(
    ("value", "name"), [(0, "negative"), ("1", "positive"), (1.0, "positive"), (" 0 ", "negative")]
)
def test_a_label_is_the_same_as_number_and_as_text(tmp_path: Path, value: Any, name: str) -> None:
    [record] = render_rows([{"text": "a", "label": value}], one(tmp_path))
    assert record["output"] == name


@pytest.mark.parametrize(
    ("value", "name"), [(-4, "negative"), ("-1", "mixed"), (0.99, "mixed"), (1, "positive"), (400, "positive")]
)
def test_numbers_fall_into_bins_that_exclude_their_upper_end(tmp_path: Path, value: Any, name: str) -> None:
    bins: Any = [{"name": "negative", "below": -1}, {"name": "mixed", "below": 1}, {"name": "positive"}]
    settings = one(tmp_path).model_copy(update={"labels": Labels(column="rating", bins=bins)})
    [record] = render_rows([{"text": "a", "rating": value}], settings)
    assert record["output"] == name


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"names": {"0": "a"}, "bins": [{"name": "a"}]},
        {"bins": [{"name": "a"}, {"name": "b", "below": 1}]},
        {"bins": [{"name": "a", "below": 2}, {"name": "b", "below": 1}]},
    ],
)
def test_labels_that_say_nothing_or_overlap_are_invalid(labels: Any) -> None:
    with pytest.raises(ValueError, match=r"either names|every bin but the last"):
        Labels(**labels)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"label": 1},
            r"row 2: template 't' of task\.yaml cannot render instruction \('text' is undefined\); the row has label",
        ),
        ({"text": "a", "label": 7}, r"row 2: field 'label' is '7', a label that has no name \(known: '0', '1'\)"),
        ({"text": "a"}, r"row 2: field 'label' is missing"),
        ({"text": "a", "label": None}, r"row 2: field 'label' is missing"),
    ],
)
def test_a_row_that_cannot_be_rendered_is_named_or_skipped(tmp_path: Path, row: Any, problem: str) -> None:
    rows = [ROWS[0], row, ROWS[1]]
    with pytest.raises(DataError, match=problem):
        list(render_rows(rows, one(tmp_path)))
    bad_rows = BadRows()
    assert [r["output"] for r in render_rows(rows, one(tmp_path), bad_rows=bad_rows)] == ["negative", "positive"]
    assert [bad.row for bad in bad_rows.rows] == [row]


def test_what_renders_empty_is_invalid_unless_the_template_passes_it_over(tmp_path: Path) -> None:
    empty = one(tmp_path, output="{% if label_value %}x{% endif %}")
    with pytest.raises(DataError, match=r"row 1: template 't' of task\.yaml renders an empty output"):
        list(render_rows(ROWS, empty))
    passed = one(tmp_path, output="{{ label }}", when="label_value == 1")
    assert [r["output"] for r in render_rows(ROWS, passed)] == ["positive"] * 4
    with pytest.raises(DataError, match="cannot render when"):
        list(render_rows(ROWS, one(tmp_path, when="nonsense > 1")))


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ text.format.__globals__ }}",
        "{{ '{0.__class__}'.format(text) }}",
        "{{ 'a' * 10**9 }}",
        "{{ [0] * 99999999 }}",
        "{% for i in range(10**8) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_a_template_cannot_run_code_read_files_or_grow_without_end(tmp_path: Path, text: str) -> None:
    with pytest.raises((ConfigError, DataError)):
        list(render_rows(ROWS[:1], one(tmp_path, output=text)))


def test_a_template_cannot_change_the_rows(tmp_path: Path) -> None:
    rows = [{"text": ["a"], "label": 0}]
    with pytest.raises(ConfigError, match="may not do that"):
        list(render_rows(rows, one(tmp_path, output="{{ text.append('b') }}")))
    assert rows == [{"text": ["a"], "label": 0}]


@pytest.mark.parametrize(("field", "text"), [("output", "{{ label"), ("instruction", "a\n{% if %}"), ("when", "a ==")])
def test_what_is_no_jinja_is_invalid_before_a_row_is_read(tmp_path: Path, field: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"template 't' of task\.yaml: {field} is not a Jinja template"):
        list(render_rows(ROWS, one(tmp_path, **{field: text})))


def test_files_that_are_no_template_files_are_invalid_with_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 4: templates\[0\]\.instructon.*did you mean"):
        list(render_rows(ROWS, file(tmp_path, "\ntask: a\ntemplates:\n  - {name: a, instructon: b, output: c}\n")))
    twice = "{name: a, instruction: b, output: c}"
    with pytest.raises(ConfigError, match="more than once"):
        list(render_rows(ROWS, file(tmp_path, f"templates: [{twice}, {twice}]")))
    with pytest.raises(ConfigError, match=r"names has 'x'.*its templates are 't'"):
        list(render_rows(ROWS, one(tmp_path).model_copy(update={"names": ("x",)})))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(render_rows(ROWS, TemplateSettings(path=tmp_path / "none.yaml")))


def test_templates_are_drawn_by_row_and_seed_alone() -> None:
    settings = TemplateSettings(builtin="classification", labels=NAMES, per_row=2)
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(300)]
    made = list(render_rows(rows, settings))
    assert made == list(render_rows(rows, settings))
    assert made[:200] == list(render_rows(rows[:100], settings))
    per_row = Counter(r["provenance"]["row"] for r in made)
    assert set(per_row.values()) == {2}
    used = Counter(r["provenance"]["template"] for r in made)
    assert len(used) == 6
    # 600 draws over 6 templates: 100 each, give or take 4 standard deviations.
    assert all(60 < count < 140 for count in used.values())
    assert made != list(render_rows(rows, settings.model_copy(update={"seed": 1})))


def test_demonstrations_are_other_rows_in_the_same_template() -> None:
    settings = TemplateSettings(builtin="classification", names=("open",), labels=NAMES, num_demonstrations=2)
    for n, record in enumerate(render_rows(ROWS, settings)):
        shown = record["demonstration"]
        assert shown.count(record["instruction"]) == 2
        assert f"text {n}\n" not in shown
        answers = {f"text {i}\n\n{('negative', 'positive')[i % 2]}" for i in range(8)}
        assert sum(answer in shown for answer in answers) == 2
    with pytest.raises(DataError, match="only 1 other rows "):
        list(render_rows(ROWS[:2], settings))


PROMPTSOURCE = """
dataset: ag_news
templates:
  24e44a81-a18a-42dd-a71c-5b31b2d2cb39: !Template
    answer_choices: World politics ||| Sports ||| Business ||| Science and technology
    id: 24e44a81-a18a-42dd-a71c-5b31b2d2cb39
    jinja: "What label best describes this news article?\\n{{text}} ||| \\n{{answer_choices[label] }}"
    metadata: !TemplateMetadata
      choices_in_prompt: false
      languages: [en]
      metrics: [Accuracy]
      original_task: true
    name: classify_question_first
    reference: ''
  8fdc1056-1029-41a1-9c67-354fc2b8ceaf: !Template
    answer_choices: null
    id: 8fdc1056-1029-41a1-9c67-354fc2b8ceaf
    jinja: "{% if label == 1 %}{{ ['Is', 'Would you say'] | choice }} this sport?\\n{{text}}|||Yes{% endif %}"
    metadata: !TemplateMetadata
      choices_in_prompt: null
      metrics: []
      original_task: false
    name: sport
    reference: ''
"""


def test_promptsources_files_load_as_they_are(tmp_path: Path) -> None:
    rows = [{"text": "A ||| B won.", "label": 1}, {"text": "Rates rise.", "label": 2}]
    made = list(render_rows(rows, file(tmp_path, PROMPTSOURCE)))
    asked = [(r["instruction"], r["output"], r["task"]) for r in made]
    question = "What label best describes this news article?\n"
    assert asked[0] == (question + "A ||| B won.", "Sports", "ag_news")
    assert asked[1][0] in ("Is this sport?\nA ||| B won.", "Would you say this sport?\nA ||| B won.")
    assert asked[1][1] == "Yes"
    assert asked[2] == (question + "Rates rise.", "Business", "ag_news")
    assert len(asked) == 3  # `sport` renders nothing for the other label: it passes the row over
    assert made == list(render_rows(rows, file(tmp_path, PROMPTSOURCE)))


def test_a_promptsource_file_cannot_name_python_objects(tmp_path: Path) -> None:
    evil = PROMPTSOURCE.replace("reference: ''", "reference: !!python/object/apply:os.system ['true']")
    with pytest.raises(ConfigError, match="cannot be read as one"):
        list(render_rows(ROWS, file(tmp_path, evil)))


BUILTIN: dict[Any, dict[str, Any]] = {
    "classification": {"text": "Fine.", "label": 1},
    "pair_classification": {"first": "A man runs.", "second": "A man moves.", "label": 0},
    "question_answering": {"question": "Who runs?", "answer": "A man.", "context": "A man runs."},
    "summarization": {"document": "A long text.", "summary": "Short."},
    "translation": {"source": "Good morning!", "target": "Chào buổi sáng!"},
    "generation": {"text": "One two three four five six seven eight nine.", "topic": "numbers"},
}


@pytest.mark.parametrize("name", BUILTIN)
def test_every_built_in_template_renders(name: Any) -> None:
    languages = {"source_language": "English", "target_language": "Vietnamese"}
    needs = {"labels": NAMES} if "label" in BUILTIN[name] else {}
    variables = languages if name == "translation" else {}
    settings = TemplateSettings(builtin=name, per_row=None, variables=variables, **needs)
    made = list(render_rows([BUILTIN[name]], settings))
    assert len(made) >= 4
    assert {r["task"] for r in made} == {name}
    assert len({(r["instruction"], r["input"]) for r in made}) == len(made)


def test_a_dataset_of_the_datasets_library_is_taken_as_it_is() -> None:
    dataset = datasets.Dataset.from_list([{"sentence": r["text"], "label": r["label"]} for r in ROWS])
    settings = TemplateSettings(builtin="classification", names=("open",), labels=NAMES)
    made: Any = render_rows(dataset, settings, fields={"text": "sentence"})
    assert [r["input"] for r in made] == [r["text"] for r in ROWS]


def test_a_trainer_reads_templated_rows_like_any_instructions(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = DataSource(
        path=str(path),
        kind="instruction",
        templates=TemplateSettings(builtin="classification", names=("open",), labels=NAMES),
    )
    first = next(iter(read_sequences(source)))
    assert isinstance(first, Conversation)
    question = "What is the category of the following text?\n\ntext 0"
    assert first.messages == ({"role": "user", "content": question}, {"role": "assistant", "content": "negative"})
    assert first.location == f"{path}:1 (template 'open')"
    assert next(iter(read_prompts(source))).messages == first.messages[:1]
    with pytest.raises(ValueError, match="templates make instruction records"):
        DataSource(path="a.jsonl", kind="text", templates=TemplateSettings(builtin="generation"))


def test_the_command_writes_records_bad_rows_and_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shared_data: Path
) -> None:
    config = tmp_path / "c.yaml"
    movies = shared_data / "movieReviewSnippets_GroundTruth.txt"
    config.write_text(
        f"""
out_dir: {tmp_path / "out"}
sources:
  - path: {movies}
    kind: instruction
    columns: [id, rating, text]
    limit: 200
    on_bad_row: skip
    templates:
      builtin: classification
      labels: {{column: rating, bins: [{{name: bad, below: 0}}, {{name: good, below: 2}}]}}
"""
    )
    assert main(["data", "templates", str(config)]) == 0
    assert "records" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text("utf-8").splitlines()]
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text("utf-8").splitlines()]
    ratings = [float(line.split("\t")[1]) for line in movies.read_text("utf-8").splitlines()[:200]]
    assert len(bad) == sum(rating >= 2 for rating in ratings) > 0
    assert all("above all bins" in row["reason"] for row in bad)
    assert len(records) == 200 - len(bad)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["rows"], report["records"], report["bad"]) == (200, len(records), len(bad))
    assert len(
        list(read_sequences(DataSource(path=str(tmp_path / "out" / "records.jsonl"), kind="instruction")))
    ) == len(records)
    assert main(["data", "templates", str(config)]) == 5
    assert main(["data", "template", str(config)]) == 2
    assert "did you mean templates?" in capsys.readouterr().err


@pytest.mark.parametrize("per_row", [1, 2])
def test_a_template_that_passes_a_row_over_makes_room_for_the_next(per_row: int) -> None:
    rows = [{"question": f"Who runs {n}?", "answer": "A man."} for n in range(100)]  # two templates want a context
    made = list(render_rows(rows, TemplateSettings(builtin="question_answering", per_row=per_row)))
    assert len(made) == 100 * per_row
    assert {r["provenance"]["template"] for r in made} == {"plain", "asked"}


def test_rows_that_no_template_wants_are_counted(tmp_path: Path) -> None:
    bad_rows = BadRows()
    settings = one(tmp_path, when="label_value == 1")
    assert len(list(render_rows(ROWS, settings, bad_rows=bad_rows))) == 4
    assert bad_rows.filtered == ["row 1", "row 3", "row 5", "row 7"]
    assert not bad_rows.rows


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a'.ljust(300000000) }}",
        "{{ 'a' | center(300000000) }}",
        "{{ '%300000000d' | format(1) }}",
        "{{ '%300000000d' % 1 }}",
        "{{ '%*d' % (300000000, 1) }}",
        "{% for i in range(9999) %}{{ text * 1000 }}{% endfor %}",
        "{{ choices | random }}",
    ],
)
def test_a_template_cannot_take_all_memory_or_draw_at_random(tmp_path: Path, text: str) -> None:
    with pytest.raises((ConfigError, DataError)):
        list(render_rows(ROWS[:1], one(tmp_path, output=text)))


def test_percent_formatting_of_ordinary_width_works(tmp_path: Path) -> None:
    [record] = render_rows([{"text": "a", "label": 0}], one(tmp_path, output="{{ '%5.1f %%' % 12.345 }}|{{ 7 % 4 }}"))
    assert record["output"] == "12.3 %|3"


def test_promptsources_most_frequent_gives_all_of_them(tmp_path: Path) -> None:
    jinja = 'jinja: "{{text}} ||| {{ answers | most_frequent | choice }}"'
    old = 'jinja: "What label best describes this news article?\\n{{text}} ||| \\n{{answer_choices[label] }}"'
    assert old in PROMPTSOURCE
    settings = file(tmp_path, PROMPTSOURCE.replace(old, jinja))
    rows = [{"text": f"t{n}", "answers": ["yes", "no", "yes", "no", "maybe"], "label": 0} for n in range(50)]
    answers = Counter(r["output"] for r in render_rows(rows, settings))
    assert set(answers) == {"yes", "no"}
