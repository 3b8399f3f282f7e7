"""References between the stages of a pipeline: `${sft.model}` for a model, `${data.reviews.train}` for a set of records.

They are read in the mapping that the file and the overrides give, before the schema sees it: what a stage naturally takes
from an earlier one is filled in, and a reference that leads nowhere becomes a problem beside those of the schema.
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

_REFERENCE = re.compile(r"^\$\{([a-z]+)\.([A-Za-z0-9_.-]+)\}$")
_SPELLING = "write ${STAGE.model} for a model, ${data.SET} or ${data.SET.PART} for records"
_OF_THE_SET = ("kind", "fields", "min_margin")
"""What a source that refers to a set takes from it, where it does not say otherwise."""


@dataclass(frozen=True)
class Reference:
    """What an earlier stage made."""

    stage: str
    output: str
    """`model` or `model_ema`; of the data stage a set, or a set and a part of it with a dot between."""

    def __str__(self) -> str:
        return f"${{{self.stage}.{self.output}}}"


@dataclass(frozen=True)
class Problem:
    """A value that cannot be meant, at its place."""

    location: Location
    value: Any
    message: str


def reference(value: Any) -> Reference | None:
    """The reference that a string is; None for every other value."""
    found = _REFERENCE.match(value) if isinstance(value, str) else None
    return Reference(*found.groups()) if found else None


def with_natural_sources(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """A pipeline's mapping with what its stages take from earlier ones filled in, and the references that lead nowhere.

    Whatever else is wrong with the mapping is left to the schema.
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
            problem for place, value in _strings(section, (stage,)) if (problem := _wrong(filled, place, value))
        ]
        _fill_sources(filled, section)
    return filled, problems


def _there(config: Mapping[str, Any], stage: str) -> bool:
    return isinstance(config.get(stage), dict)


# -- Models -----------------------------------------------------------------------------------------------------------


def _fill_models(config: dict[str, Any], stage: str) -> list[Problem]:
    """Give the models of a stage their natural starting points: reward and policy begin as the SFT model, and so on."""
    section = config[stage]
    problems = []
    for name, earlier in {"reward": {"model": "sft"}, "ppo": {"policy": "sft", "reward": "reward"}}.get(
        stage, {}
    ).items():
        model = section.setdefault(name, {})
        if not isinstance(model, dict) or model.get("model_path") is not None:
            continue
        if _there(config, earlier):
            model["model_path"] = f"${{{earlier}.model}}"
        else:
            problems.append(_missing(stage, name, f"an {earlier} stage" if earlier == "sft" else f"a {earlier} stage"))
    return problems + (_fill_eval(config, section) if stage == "eval" else [])


def _fill_eval(config: dict[str, Any], section: dict[str, Any]) -> list[Problem]:
    """An evaluation measures the last policy against what PPO started from, with the pipeline's reward model."""
    given = section.get("data")
    data = given if isinstance(given, dict) else {}
    prompts, instructions, preferences = (bool(data.get(k)) for k in ("prompts", "instructions", "preferences"))
    last = next((stage for stage in ("ppo", "sft") if _there(config, stage)), None)
    natural = {
        "policy": (prompts or instructions, f"${{{last}.model}}" if last else None),
        "reward": (prompts or preferences, "${reward.model}" if _there(config, "reward") else None),
    }
    problems = []
    for name, (wanted, source) in natural.items():
        problems += _fill_evaluated(section, name, wanted, source)
    policy = section.get("policy")
    of_ppo = reference(policy.get("model_path")) if isinstance(policy, dict) else None
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
    ppo = config["ppo"] if _there(config, "ppo") else {}
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
    """A source that refers to a set is of the set's kind; of the same kind, it has its fields and margin, too."""
    for node in _mappings(tree):
        found = reference(node.get("path"))
        if found is None or found.stage != "data":
            continue
        sources = _sets(config).get(found.output.partition(".")[0], {}).get("sources")
        first = sources[0] if isinstance(sources, (list, tuple)) and sources else None
        if isinstance(first, dict) and node.get("kind", first.get("kind")) == first.get("kind"):
            for name in _OF_THE_SET:
                if name in first:
                    node.setdefault(name, copy.deepcopy(first[name]))


def _mappings(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ():
        yield from _mappings(value)


# -- What can be wrong with a reference -------------------------------------------------------------------------------


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


def _wrong(config: Mapping[str, Any], place: Location, value: str) -> Problem | None:
    found = reference(value)
    stage, key = str(place[0]), place[-1]
    if found is None or found.stage not in STAGES:
        message = f"is {value!r}, which is no reference; {_SPELLING}"
    elif key not in ("path", "model_path") or (key == "path") != (found.stage == "data"):
        message = f"is {value!r}, and only a model_path takes a model and only the path of a source takes records; {_SPELLING}"
    elif STAGES.index(found.stage) >= STAGES.index(stage):
        message = f"is {value!r}, but {found.stage} does not run before {stage}; name an earlier stage, or give a path"
    elif not _there(config, found.stage):
        message = f"is {value!r}, but the pipeline has no {found.stage} stage; add it, or give a path"
    else:
        message = _wrong_records(config, found) if found.stage == "data" else _wrong_model(config, found)
    return Problem(place, value, message) if message else None


def _wrong_model(config: Mapping[str, Any], found: Reference) -> str:
    settings = config[found.stage].get("ppo")
    averaged = found.stage == "ppo" and isinstance(settings, dict) and settings.get("ema_decay") is not None
    if found.output == "model" or (found.output == "model_ema" and averaged):
        return ""
    if found.output == "model_ema" and found.stage == "ppo":
        return f"is '{found}', but ppo keeps no average of the weights; set ppo.ppo.ema_decay, or write ${{ppo.model}}"
    return f"is '{found}', but {found.stage} makes no {found.output!r}; write ${{{found.stage}.model}}"


def _wrong_records(config: Mapping[str, Any], found: Reference) -> str:
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
        return f"is '{found}', but the set is divided; name one of its parts: {choices}"
    if dot and not parts:
        return f"is '{found}', but the set is not divided; write ${{data.{name}}}, or give the set parts"
    return ""
