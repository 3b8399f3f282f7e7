"""A run's configuration: one YAML file, then `--section.key value` overrides, then one validation.

pydantic-settings reads the overrides into a nested mapping, which is laid over the file's mapping; pydantic then checks
the result once. So every problem of a configuration is reported together, whichever of the two places it came from,
and cross-field rules see the final values. Relative paths in a configuration are relative to the current directory.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from rlhf_dist.config.keys import choices_of, dotted, nearest_key, schema_keys
from rlhf_dist.config.yaml_file import Location, parse_yaml, read_mapping, to_yaml
from rlhf_dist.core.errors import ConfigError

T = TypeVar("T", bound=BaseModel)


class _OverrideError(Exception):
    """argparse's one-line complaint."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _OverrideError(message)


def load_config(schema: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """Check the YAML file at `path` (none: no file) under `overrides`, e.g. ["--ppo.kl_coef", "0.1", "--seed=3"].

    Booleans are true/false, `null` clears a value, lists and mappings are JSON or YAML (`--data.ptx '[{path: a.txt,
    kind: text}]'`). Raises ConfigError with every problem, each with its key, value, constraint and remedy.
    """
    from_file, lines = read_mapping(path) if path is not None else ({}, {})
    known, problems = _without_unknown(schema, overrides)
    from_arguments = _parsed(schema, known)
    try:
        config = schema.model_validate(_merged(from_file, from_arguments))
    except ValidationError as error:
        problems += [_problem(schema, e, path, lines, from_arguments) for e in _causes(error)]
    else:
        if not problems:
            return config
    source = str(path) if path is not None else "the command line"
    count = "is 1 problem" if len(problems) == 1 else f"are {len(problems)} problems"
    raise ConfigError(f"There {count} in the configuration from {source}:\n" + "\n".join(f"- {p}" for p in problems))


def load_file(schema: type[T], path: Path) -> T:
    """Check a YAML file beside the configuration, which no override reaches. Errors as `load_config`."""
    content, lines = read_mapping(path)
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problems = [_problem(schema, e, path, lines, {}, has_flags=False) for e in _causes(error)]
    count = "is 1 problem" if len(problems) == 1 else f"are {len(problems)} problems"
    raise ConfigError(f"There {count} in {path}:\n" + "\n".join(f"- {p}" for p in problems))


def dump_yaml(config: BaseModel) -> str:
    """The resolved configuration, defaults included; `load_config` reads it back as an equal one."""
    return to_yaml(config.model_dump(mode="json"))


def json_schema(schema: type[BaseModel]) -> str:
    """JSON schema for editors that check YAML."""
    return json.dumps(schema.model_json_schema(), indent=2)


def overrides_help(schema: type[BaseModel], prog: str, usage: str, epilog: str) -> str:
    """Every key with its type, default and help, in one group a section."""
    parser = _Parser(prog=prog, usage=usage, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = schema.__doc__
    _cli_source(schema, parser)
    return parser.format_help()


def _cli_source(schema: type[BaseModel], parser: argparse.ArgumentParser) -> Any:
    # Imported here: reading a schema must not pay for it.
    from pydantic_settings import BaseSettings, CliSettingsSource

    # CliSettingsSource accepts BaseSettings only; the pair is never instantiated, so no environment variable is read.
    bases: Any = (schema, BaseSettings)
    settings: Any = type(schema.__name__, bases, {"__module__": schema.__module__, "__doc__": None})
    return CliSettingsSource(
        settings,
        root_parser=parser,
        parse_args_method=argparse.ArgumentParser.parse_args,
        cli_parse_none_str="null",
        cli_hide_none_type=True,
        cli_use_class_docs_for_groups=True,
        case_sensitive=True,
    )


def _without_unknown(schema: type[BaseModel], overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of known keys, with YAML lists and mappings turned into JSON; and what is wrong with the others."""
    keys = schema_keys(schema)
    known: list[str] = []
    problems: list[str] = []
    wanted = False
    for token in overrides:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            wanted = name in keys
            if not wanted:
                problems.append(f"--{name}: {_unknown(tuple(name.split('.')), keys, '--')}")
            else:
                known.append(f"--{name}{equals}{_as_json(value, name)}")
        elif not known and not problems:
            problems.append(
                f"'{token}' stands where an override is expected; overrides are written --section.key value, and the "
                "configuration file comes first."
            )
        elif wanted:
            known.append(_as_json(token, known[-1].lstrip("-")))
    return known, problems


def _as_json(value: str, name: str) -> str:
    """pydantic-settings reads JSON; the flow style of YAML, `[{path: a.txt}]`, is what people have in their files."""
    return json.dumps(parse_yaml(value, f"--{name}"), default=str) if value[:1] in ("[", "{") else value


def _parsed(schema: type[BaseModel], overrides: list[str]) -> dict[str, Any]:
    """Overrides of known keys as a nested mapping of strings, lists and mappings. Raises ConfigError."""
    from pydantic_settings import SettingsError

    parser = _Parser(add_help=False, allow_abbrev=False)
    source = _cli_source(schema, parser)
    try:
        return _typed(schema, source(args=overrides)())
    except _OverrideError as rejection:
        raise ConfigError(
            f"Cannot read the overrides: {rejection}. Write --section.key value, or --section.key=value when the value "
            "begins with a dash."
        ) from None
    except SettingsError as error:
        raise ConfigError(
            f"Cannot read the overrides: {error} ({error.__cause__}). Write a list or mapping as JSON or YAML, "
            "in quotes."
        ) from None


def _typed(schema: type[BaseModel], given: Any, prefix: str = "") -> Any:
    """pydantic makes numbers of text, but not where a field is a `Literal` of numbers: those are read as YAML here."""
    if not isinstance(given, Mapping):
        numbers = any(not isinstance(choice, str) for choice in choices_of(schema, prefix)) if prefix else False
        return parse_yaml(given, f"--{prefix}") if numbers and isinstance(given, str) else given
    keys = {name: f"{prefix}.{name}" if prefix else name for name in given}
    known = schema_keys(schema)
    return {name: _typed(schema, value, keys[name]) if keys[name] in known else value for name, value in given.items()}


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `under`, section by section; lists are replaced whole."""
    out = dict(under)
    for key, value in over.items():
        below = out.get(key)
        out[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


def _causes(error: ValidationError) -> list[Any]:
    """Without the complaints that follow from others: a list counts as too short when its items are wrong."""
    errors = error.errors(include_url=False)
    places = [e["loc"] for e in errors]

    def follows(e: Any) -> bool:
        depth = len(e["loc"])
        return e["type"] == "too_short" and any(len(p) > depth and p[:depth] == e["loc"] for p in places)

    return [e for e in errors if not follows(e)]


def _problem(
    schema: type[BaseModel],
    error: Any,
    path: Path | None,
    lines: Mapping[Location, int],
    arguments: Mapping[str, Any],
    has_flags: bool = True,
) -> str:
    """One line: where, which key, what value, what it must be, what to do."""
    location: Location = tuple(error["loc"])
    key = dotted(location)
    flag = f"--{key.partition('[')[0]}"  # Items of a list have no flag of their own.
    by_argument = _has(arguments, location)
    if by_argument or path is None:
        where = ""
    else:
        line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
        where = f"line {line}: " if line else ""
    help_text = _help(schema, location)
    if error["type"] == "extra_forbidden":
        return f"{where}{key}: {_unknown(location, schema_keys(schema))}"
    if error["type"] == "missing":
        add = f"Add it to the file, or pass {flag} VALUE" if has_flags else "Add it"
        return f"{where}{key} is missing, and has no default{help_text}. {add}."
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"]).rstrip(".")
        return f"{where}{key}: {message}." if key else f"{message}."
    must = error["msg"].replace("Input should be", "must be").replace("Input should", "must")
    if error["type"] == "model_type":  # pydantic names the class
        must = "must be a section of keys, {key: value}"
    change = f"Change {flag}" if by_argument else f"Change it{f', or pass {flag} VALUE' if has_flags else ''}"
    return f"{where}{key} is {error['input']!r}, but {must[0].lower() + must[1:]}{help_text}. {change}."


def _unknown(location: Location, keys: Mapping[str, str], dashes: str = "") -> str:
    guess = nearest_key(location, keys)
    if guess is None:
        section = dotted(location[:-1])
        of_any_item = re.sub(r"\[\d+\]", "[]", section)
        siblings = sorted(k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == of_any_item)
        section = section or "the top level"
        return f"there is no such key; {section} has {', '.join(siblings)}. Remove it or use one of these."
    return f"there is no such key; did you mean {dashes}{guess}? Rename or remove it."


def _help(schema: type[BaseModel], location: Location) -> str:
    text = schema_keys(schema).get(dotted("[]" if isinstance(s, int) else s for s in location).replace(".[]", "[]"), "")
    return f" - {text.rstrip('.')}" if text else ""


def _has(mapping: Any, location: Location) -> bool:
    try:
        for step in location:
            mapping = mapping[step]
    except (LookupError, TypeError):
        return False
    return bool(location)
