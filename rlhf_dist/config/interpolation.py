"""Interpolation between the stages of a pipeline: `${sft.model}` is a model, `${data.reviews.train}` a set of records.

It works on the mapping that the file and the overrides give, before the schema checks it: inputs that a stage takes from an
earlier one by default are filled in, and an interpolation that does not resolve is reported beside the errors of the schema.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rlhf_dist.config.yaml_file import Location

STAGES = ("data", "sft", "reward", "ppo", "eval")
"""In the order in which they run."""

_PATTERN = re.compile(r"^\$\{([a-z]+)\.([A-Za-z0-9_.-]+)\}$")
_SYNTAX = "write ${STAGE.model} for a model, ${data.SET} or ${data.SET.PART} for records"
_INHERITED_KEYS = ("kind", "fields", "min_margin")
"""What a source that reads a set takes over from it, unless it sets its own."""


@dataclass(frozen=True)
class Interpolation:
    """An output of an earlier stage."""

    stage: str
    output: str
    """`model` or `model_ema`; of the data stage a set, or a set and a part of it with a dot between."""

    def __str__(self) -> str:
        return f"${{{self.stage}.{self.output}}}"


@dataclass(frozen=True)
class Problem:
    """An invalid value, and where it is."""

    location: Location
    value: Any
    message: str


def parse_interpolation(value: Any) -> Interpolation | None:
    """The value as an interpolation; None where it is none."""
    found = _PATTERN.match(value) if isinstance(value, str) else None
    return Interpolation(*found.groups()) if found else None


def with_defaults(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """A pipeline's mapping with default inputs filled in from earlier stages, and the interpolations that do not resolve.

    All other errors are left to the schema.
    """
    filled = copy.deepcopy(dict(given))
    problems: list[Problem] = []
    for stage in STAGES:
        section = filled.get(stage)
        if not isinstance(section, dict):
            continue
        for name in ("tracking", "checkpoint"):
            if isinstance(section.get(name), dict) and isinstance(filled.get(name), dict):
                section[name] = {**filled[name], **section[name]}
        problems += _fill_models(filled, stage)
        problems += [
            problem for place, value in _strings(section, (stage,)) if (problem := _error(filled, place, value))
        ]
        _fill_sources(filled, section)
    return filled, problems


def _has_stage(config: Mapping[str, Any], stage: str) -> bool:
    return isinstance(config.get(stage), dict)


# -- Models -----------------------------------------------------------------------------------------------------------


def _fill_models(config: dict[str, Any], stage: str) -> list[Problem]:
    """Default starting weights of a stage's models: reward and policy start from the SFT model, and so on."""
    section = config[stage]
    problems = []
    for name, earlier in {"reward": {"model": "sft"}, "ppo": {"policy": "sft", "reward": "reward"}}.get(
        stage, {}
    ).items():
        model = section.setdefault(name, {})
        if not isinstance(model, dict) or model.get("model_path") is not None:
            continue
        if _has_stage(config, earlier):
            model["model_path"] = f"${{{earlier}.model}}"
        else:
            problems.append(_missing(stage, name, f"an {earlier} stage" if earlier == "sft" else f"a {earlier} stage"))
    return problems + (_fill_eval(config, section) if stage == "eval" else [])


def _fill_eval(config: dict[str, Any], section: dict[str, Any]) -> list[Problem]:
    """An evaluation measures the last policy against what PPO started from, with the pipeline's reward model."""
    given = section.get("data")
    data = given if isinstance(given, dict) else {}
    prompts, instructions, preferences = (bool(data.get(k)) for k in ("prompts", "instructions", "preferences"))
    last = next((stage for stage in ("ppo", "sft") if _has_stage(config, stage)), None)
    defaults = {
        "policy": (prompts or instructions, f"${{{last}.model}}" if last else None),
        "reward": (prompts or preferences, "${reward.model}" if _has_stage(config, "reward") else None),
    }
    problems = []
    for name, (wanted, source) in defaults.items():
        problems += _fill_evaluated(section, name, wanted, source)
    policy = section.get("policy")
    of_ppo = parse_interpolation(policy.get("model_path")) if isinstance(policy, dict) else None
    start = _ppo_reference(config) if of_ppo and of_ppo.stage == "ppo" else None
    return problems + _fill_evaluated(section, "reference", prompts and start is not None, start)


def _fill_evaluated(section: dict[str, Any], name: str, wanted: bool, source: str | None) -> list[Problem]:
    if name not in section and not (wanted and source):
        return []
    model = section.setdefault(name, {})
    if not isinstance(model, dict) or model.get("model_path") is not None:
        return []
    if source is None:
        return [_missing("eval", name, "an earlier stage")]
    model["model_path"] = source
    return []


def _ppo_reference(config: Mapping[str, Any]) -> str | None:
    ppo = config["ppo"] if _has_stage(config, "ppo") else {}
    for role in ("reference", "policy"):
        model = ppo.get(role)
        if isinstance(model, dict) and isinstance(model.get("model_path"), str):
            return model["model_path"]
    return None


def _missing(stage: str, name: str, source: str) -> Problem:
    message = f"is missing, and there is no {source.partition(' ')[2]} to take it from; set it, or add {source}"
    return Problem((stage, name, "model_path"), None, message)


# -- Records ----------------------------------------------------------------------------------------------------------


def _sets(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name → set, of those that can be read."""
    data = config.get("data")
    sets = data.get("sets") if isinstance(data, dict) else None
    if not isinstance(sets, (list, tuple)):
        return {}
    return {item["name"]: item for item in sets if isinstance(item, dict) and isinstance(item.get("name"), str)}


def _fill_sources(config: Mapping[str, Any], tree: Any) -> None:
    """A source that reads a set has the set's kind by default; and where it has that kind, its fields and margin."""
    for node in _mappings(tree):
        found = parse_interpolation(node.get("path"))
        if found is None or found.stage != "data":
            continue
        sources = _sets(config).get(found.output.partition(".")[0], {}).get("sources")
        first = sources[0] if isinstance(sources, (list, tuple)) and sources else None
        if isinstance(first, dict) and node.get("kind", first.get("kind")) == first.get("kind"):
            for name in _INHERITED_KEYS:
                if name in first:
                    node.setdefault(name, copy.deepcopy(first[name]))


def _mappings(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ():
        yield from _mappings(value)


# -- Errors -----------------------------------------------------------------------------------------------------------


def _strings(tree: Any, place: Location) -> Iterator[tuple[Location, str]]:
    """Every string that holds "${", with its place."""
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        if isinstance(tree, str) and "${" in tree:
            yield place, tree
        return
    for key, value in items:
        yield from _strings(value, (*place, key))


def _error(config: Mapping[str, Any], place: Location, value: str) -> Problem | None:
    found = parse_interpolation(value)
    stage, key = str(place[0]), place[-1]
    if found is None or found.stage not in STAGES:
        message = f"is {value!r}, which is not an interpolation; {_SYNTAX}"
    elif key not in ("path", "model_path") or (key == "path") != (found.stage == "data"):
        message = (
            f"is {value!r}, and only a model_path takes a model and only the path of a source takes records; {_SYNTAX}"
        )
    elif STAGES.index(found.stage) >= STAGES.index(stage):
        message = f"is {value!r}, but {found.stage} does not run before {stage}; name an earlier stage, or give a path"
    elif not _has_stage(config, found.stage):
        message = f"is {value!r}, but the pipeline has no {found.stage} stage; add it, or give a path"
    else:
        message = _records_error(config, found) if found.stage == "data" else _model_error(config, found)
    return Problem(place, value, message) if message else None


def _model_error(config: Mapping[str, Any], found: Interpolation) -> str:
    settings = config[found.stage].get("ppo")
    averaged = found.stage == "ppo" and isinstance(settings, dict) and settings.get("ema_decay") is not None
    if found.output == "model" or (found.output == "model_ema" and averaged):
        return ""
    if found.output == "model_ema" and found.stage == "ppo":
        return f"is '{found}', but ppo keeps no moving average of the weights; set ppo.ppo.ema_decay, or write ${{ppo.model}}"
    return f"is '{found}', but {found.stage} makes no {found.output!r}; write ${{{found.stage}.model}}"


def _records_error(config: Mapping[str, Any], found: Interpolation) -> str:
    sets = _sets(config)
    name, dot, part = found.output.partition(".")
    if name not in sets:
        near = get_close_matches(name, sets, 1)
        guess = f"did you mean {near[0]}?" if near else f"data.sets has {', '.join(sets) or 'no set with a name'}."
        return f"is '{found}', but no set has that name; {guess}"
    parts = sets[name].get("parts")
    parts = list(parts) if isinstance(parts, dict) else []
    if parts and part not in parts:
        choices = ", ".join(f"${{data.{name}.{p}}}" for p in parts)
        return f"is '{found}', but the set has parts; name one of them: {choices}"
    if dot and not parts:
        return f"is '{found}', but the set has no parts; write ${{data.{name}}}, or give the set parts"
    return ""
