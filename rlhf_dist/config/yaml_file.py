"""Reading and writing configuration files.

PyYAML follows YAML 1.1, in which `resume: no` and `wandb: off` are the boolean false, `1e-5` is a string, `010` is 8 and
`1:30` is 90. The loader here follows the YAML 1.2 rules for booleans and numbers; the dumper writes what reads back the same
under either version.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from rlhf_dist.core.errors import ConfigError

Location = tuple[str | int, ...]
"""A key's place in the nested configuration, e.g. ("data", "train", 0, "path")."""

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9]+$|^0o[0-7]+$|^0x[0-9a-fA-F]+$")
_FLOAT = re.compile(
    r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_REPLACED = tuple(f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp"))


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            line = key_node.start_mark.line + 1
            if isinstance(key, str) and key in seen:
                raise ConfigError(
                    f"{node.start_mark.name}, line {line}: the key '{key}' is already in line {seen[key]}; a key may "
                    "appear once in a section. Remove one of the two."
                )
            if isinstance(key, str):
                seen[key] = line
        return super().construct_mapping(node, deep=deep)


def _construct_int(_: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)


class _Dumper(yaml.SafeDumper):
    """Keeps the old rules beside the new ones, so that strings which either would misread ('no', '1e-5') are quoted."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if tag not in _REPLACED]
    for first, rules in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, name: str = "<text>") -> Any:
    """The value that `text` holds. Raises ConfigError naming `name` and the line when it is not YAML."""
    return _parsed(text, name)[0]


def read_mapping(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    """A YAML file's mapping ({} for an empty file), and the 1-based line of each of its keys and list items.

    Raises ConfigError when the file cannot be read, is not UTF-8 or YAML, repeats a key, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"The configuration file {path} does not exist (looked in {Path.cwd()}). Give the path of a YAML file."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(
            f"The configuration file {path} cannot be read: {error.strerror}. Give the path of a readable YAML file."
        ) from None
    value, lines = _parsed(text, str(path))
    if value is None:
        return {}, {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} holds a {type(value).__name__}; a configuration is a mapping of keys to values, such as `seed: 0`."
        )
    return value, lines


def to_yaml(value: Any) -> str:
    """`value` (plain dicts, lists, strings, numbers, booleans, None) as YAML that `parse_yaml` reads back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _parsed(text: str, name: str) -> tuple[Any, dict[Location, int]]:
    try:
        loader = _Loader(text)
        loader.name = name
        node = loader.get_single_node()
        if node is None:
            return None, {}
        return loader.construct_document(node), _lines(node, ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            f"{name}{where}: this is not valid YAML ({problem}). Check the indentation, and that brackets and quotes "
            "are closed."
        ) from None


def _lines(node: Any, at: Location) -> dict[Location, int]:
    found: dict[Location, int] = {}
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(i, value, value) for i, value in enumerate(node.value)]
    else:
        return found
    for step, marked, value in children:
        found[(*at, step)] = marked.start_mark.line + 1
        found.update(_lines(value, (*at, step)))
    return found
