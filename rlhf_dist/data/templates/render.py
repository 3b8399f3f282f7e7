"""Rows of a labeled data set → instruction records, by templates.

Templates run in a sandbox (`sandbox.py`). A name that the row does not have is an error, not a blank.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

from rlhf_dist.config.data import DataSource
from rlhf_dist.config.templates import Labels, Template, TemplateSettings
from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.core.random import derived_seed, permutation
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.data.fields import Fields
from rlhf_dist.data.templates.files import PromptsourceTemplate, Templates, load_templates
from rlhf_dist.data.templates.sandbox import Sandbox
from rlhf_dist.data.templates.sandbox import render as rendered_text

_SEPARATOR = "|||"
_HIDDEN_SEPARATOR = "\x00separator\x00"
"""Replaces a `|||` in the data while a promptsource template is split at its own."""


@dataclass(frozen=True)
class Rendered:
    """What a template makes of a row."""

    instruction: str
    input: str
    output: str


Render = Callable[[Fields, int], Rendered | None]
"""A row and its number → a record; None where the template filters the row out."""


def instruction_rows(
    rows: Iterable[Fields], settings: TemplateSettings, policy: Any = "error", bad_rows: BadRows | None = None
) -> Iterator[dict[str, Any]]:
    """Instruction records with `task` and `provenance` (template, its file, the row's place).

    Args:
        rows: labeled rows.
        settings: which templates, and how many a row.
        policy: `on_bad_row`, for a row that a template cannot render.
        bad_rows: takes such rows under `skip`, and the places of rows that every template filters out.

    Raises:
        ConfigError: an invalid template file or template.
        DataError: a row lacks a name that a template uses, has an unknown label, or renders empty; with its place.
    """
    bad_rows = BadRows() if bad_rows is None else bad_rows
    templates = load_templates(settings)
    renders = [_compiled(template, templates, settings.seed) for template in templates.templates]
    if settings.num_demonstrations:
        rows = list(rows)
    for number, row in enumerate(rows):
        taken = 0
        for which in _drawn(settings, number, len(renders)):
            if taken == settings.per_row:
                break
            with bad_rows.guard(policy, row.values):
                taken += 1  # also by a template that the row is bad for: it is listed once, not for every template
                rendered = renders[which](row, number)
                if rendered is None:
                    taken -= 1  # the next drawn template takes its place
                    continue
                record = {"instruction": rendered.instruction, "input": rendered.input, "output": rendered.output}
                if settings.num_demonstrations and isinstance(rows, Sequence):
                    record["demonstration"] = _demonstration(renders[which], rows, number, settings)
                name = templates.templates[which].name
                provenance = {"template": name, "templates": templates.origin, "row": row.location}
                yield record | {"task": templates.task, "provenance": provenance}
        if not taken:
            bad_rows.filtered.append(row.location)


def templated_rows(source: DataSource, rows: Iterable[Fields], bad_rows: BadRows | None) -> Iterator[Fields]:
    """The rows of a source with `templates`, as instruction records that are read like any others."""
    assert source.templates is not None
    for record in instruction_rows(rows, source.templates, source.on_bad_row, bad_rows):
        found = record["provenance"]
        yield Fields(f"{found['row']} (template {found['template']!r})", record, {})


def _drawn(settings: TemplateSettings, number: int, num_templates: int) -> list[int]:
    """The order in which a row tries the templates: a function of the row's number alone."""
    if settings.per_row is None:
        return list(range(num_templates))
    return permutation(settings.seed, "data/templates", number, num_templates).tolist()


def _demonstration(render: Render, rows: Sequence[Fields], number: int, settings: TemplateSettings) -> str:
    """Worked examples from other rows, those first that come first in a draw of this row's own."""
    examples: list[str] = []
    tries = min(len(rows), 20 * settings.num_demonstrations + 20)
    start = derived_seed(settings.seed, "data/demonstrations", number)
    own = render(rows[number], number)
    for other in dict.fromkeys((start + step * _STRIDE) % len(rows) for step in range(tries)):
        if len(examples) == settings.num_demonstrations:
            break
        try:
            found = None if other == number else render(rows[other], other)
        except DataError:
            continue  # a bad row is reported where it is itself rendered
        # The same text with its answer would give the answer away.
        if found is not None and own is not None and (found.instruction, found.input) != (own.instruction, own.input):
            examples.append("\n\n".join(part for part in (found.instruction, found.input, found.output) if part))
    if len(examples) < settings.num_demonstrations:
        raise DataError(
            f"{rows[number].location}: only {len(examples)} other rows can be demonstrations, and "
            f"num_demonstrations is {settings.num_demonstrations}; lower it, or give more rows"
        )
    return "\n\n".join(examples)


_STRIDE = 2_654_435_761
"""Knuth's multiplicative hash: successive examples are far apart."""


def _compiled(template: Template | PromptsourceTemplate, templates: Templates, seed: int) -> Render:
    if isinstance(template, PromptsourceTemplate):
        return _compiled_promptsource(template, templates, seed)
    environment = Sandbox(keep_trailing_newline=True)
    place = f"template {template.name!r} of {templates.origin}"
    parts = {
        field: _parsed(environment.from_string, place, field, text)
        for field, text in (
            ("instruction", template.instruction),
            ("input", template.input or ""),
            ("output", template.output),
        )
    }
    when = _parsed(
        lambda text: environment.compile_expression(text, undefined_to_none=False),
        place,
        "when",
        template.when or "true",
    )

    def render(row: Fields, number: int) -> Rendered | None:
        values = {**templates.variables, **row.named_values()}
        if templates.labels is not None:
            values |= _label_values(row, templates.labels, template.labels)
        if not _ran(lambda: _truth(when(**values)), row, place, "when"):
            return None
        texts = {
            field: _ran(lambda p=part: rendered_text(p, values), row, place, field).strip()
            for field, part in parts.items()
        }
        for field in ("instruction", "output"):
            if not texts[field]:
                raise DataError(
                    f"{row.location}: {place} renders an empty {field}; fix the row, give the template a `when` that filters "
                    "such rows out, or set on_bad_row to skip"
                )
        return Rendered(**texts)

    return render


def _compiled_promptsource(template: PromptsourceTemplate, templates: Templates, seed: int) -> Render:
    place = f"template {template.name!r} of {templates.origin}"
    environment = Sandbox(keep_trailing_newline=True)
    drawn = itertools.count()
    now = [0]

    def choice(items: Any) -> Any:
        """promptsource's random choice; here a function of seed, template, row, and of which choice in the row it is."""
        listed = list(items)
        return listed[derived_seed(seed, f"data/promptsource/{template.name}", now[0], next(drawn)) % len(listed)]

    environment.globals["zip"] = zip
    environment.filters["choice"] = choice
    environment.filters["highlight"] = lambda text: text
    environment.filters["most_frequent"] = _most_frequent
    body = _parsed(environment.from_string, place, "jinja", template.jinja)
    choices = _parsed(environment.from_string, place, "answer_choices", template.answer_choices or "")

    def render(row: Fields, number: int) -> Rendered | None:
        nonlocal drawn
        drawn, now[0] = itertools.count(), number
        values = {**templates.variables, **_hidden(row.named_values())}
        if template.answer_choices:
            listed = _ran(lambda: rendered_text(choices, values), row, place, "answer_choices").split(_SEPARATOR)
            values["answer_choices"] = [_shown(item).strip() for item in listed]
        asked, *answers = _ran(lambda: rendered_text(body, values), row, place, "jinja").split(_SEPARATOR)
        asked, answers = _shown(asked).strip(), [_shown(answer).strip() for answer in answers]
        if not asked and not any(answers):
            return None  # that is how promptsource's templates filter a row out
        if not asked or not answers or not answers[0]:
            empty = "question" if not asked else "answer"
            raise DataError(
                f"{row.location}: {place} renders an empty {empty}; fix the row, deselect the template (templates.names), or "
                "set on_bad_row to skip"
            )
        return Rendered(asked, "", answers[0])

    return render


def _hidden(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(_SEPARATOR, _HIDDEN_SEPARATOR)
    if isinstance(value, Mapping):
        return {key: _hidden(item) for key, item in value.items()}
    return [_hidden(item) for item in value] if isinstance(value, list) else value


def _shown(text: str) -> str:
    return text.replace(_HIDDEN_SEPARATOR, _SEPARATOR)


def _label_values(row: Fields, labels: Labels, renamed: Mapping[str, str]) -> dict[str, Any]:
    """`label`, `label_value` and `choices` of a row."""
    value = row.column(labels.column)
    name = _binned(row, labels, value) if labels.bins else _named(row, labels, value)
    unknown = [other for other in renamed if other not in labels.choices]
    if unknown:
        raise ConfigError(
            f"the labels of a template rename {', '.join(map(repr, unknown))}; the names are {', '.join(labels.choices)}"
        )
    choices = [renamed.get(choice, choice) for choice in labels.choices]
    return {"label": renamed.get(name, name), "label_value": value, "choices": choices}


def _named(row: Fields, labels: Labels, value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if isinstance(value, float) and value.is_integer():
        text = str(int(value))
    if text not in labels.names:
        raise row.error(
            labels.column,
            f"is {text[:40]!r}, a label that has no name (known: {', '.join(map(repr, labels.names))})",
            "add it to labels.names, or fix the row",
        )
    return labels.names[text]


def _binned(row: Fields, labels: Labels, value: Any) -> str:
    number = row.checked_number(labels.column, value)
    for item in labels.bins:
        if item.below is None or number < item.below:
            return item.name
    raise row.error(
        labels.column, f"is {number:g}, above all bins", "raise the last bin's `below`, or omit it for no bound"
    )


def _most_frequent(items: Sequence[Any]) -> list[Any] | None:
    """promptsource's: all items that are as frequent as the most frequent one; None of nothing."""
    counts = Counter(items)
    return [item for item, count in counts.items() if count == max(counts.values())] if counts else None


def _parsed(parse: Callable[[str], Any], place: str, field: str, text: str) -> Any:
    try:
        return parse(text)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        at = f" in line {line}" if line else ""
        raise ConfigError(f"{place}: {field} is not a Jinja template ({error}{at}); fix it") from error


def _truth(value: Any) -> bool:
    return bool(value)  # raises where a name is undefined


def _ran(render: Callable[[], Any], row: Fields, place: str, field: str) -> Any:
    """What a template renders for a row; an exception in it becomes an error of the row or of the template."""
    try:
        result = render()
    except SecurityError as error:
        raise ConfigError(
            f"{place}: {field} may not do that ({error}); templates only format what they are given"
        ) from error
    except RecursionError as error:
        raise DataError(f"{row.location}: {place}: {field} does not end; fix the template") from error
    except Exception as error:  # undefined names, and what filters and operators raise on values of other types
        known = ", ".join(row.named_values())
        raise DataError(
            f"{row.location}: {place} cannot render {field} ({error}); the row has {known}: map a column with fields, give "
            "variables, or fix the row or the template"
        ) from error
    return result
