"""Reading template files: this project's, and promptsource's (Bach et al. 2022) as they are.

A promptsource template is one Jinja text with `|||` between what is asked and what is answered, and `answer_choices`, a
Jinja text with `|||` between the choices, which the template sees as a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from rlhf_dist.config.load import load_file
from rlhf_dist.config.templates import Labels, Template, TemplateFile, TemplateSettings
from rlhf_dist.core.errors import ConfigError


@dataclass(frozen=True)
class PromptsourceTemplate:
    """One template of a promptsource file."""

    name: str
    jinja: str
    answer_choices: str | None


@dataclass(frozen=True)
class Templates:
    """The templates that a source uses."""

    origin: str
    """The file's name, or `builtin:NAME`."""
    task: str
    labels: Labels | None
    variables: Mapping[str, str]
    templates: tuple[Template | PromptsourceTemplate, ...]


def load_templates(settings: TemplateSettings) -> Templates:
    """The templates that `settings` names.

    Raises:
        ConfigError: the file cannot be read, is not a template file, or lacks a template of a wanted name.
    """
    path = settings.path
    if path is None:
        with resources.as_file(resources.files("rlhf_dist.data") / "templates" / f"{settings.builtin}.yaml") as file:
            found = _own(file, f"builtin:{settings.builtin}")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"templates.path {path} cannot be read ({reason}); name a YAML file in UTF-8") from error
        found = _promptsource(text, path.name) if "!Template" in text else _own(path, path.name)
    task = settings.task or found.task
    labels, variables = settings.labels or found.labels, {**found.variables, **settings.variables}
    return Templates(found.origin, task, labels, variables, _wanted(found, settings.names))


def _wanted(found: Templates, names: tuple[str, ...]) -> tuple[Template | PromptsourceTemplate, ...]:
    known = {template.name: template for template in found.templates}
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigError(
            f"templates.names has {', '.join(map(repr, missing))}, which {found.origin} does not have; its templates are "
            f"{', '.join(map(repr, known))}"
        )
    return tuple(known[name] for name in names) or found.templates


def _own(path: Path, origin: str) -> Templates:
    file = load_file(TemplateFile, path)
    task = file.task or origin.removeprefix("builtin:").removesuffix(".yaml").removesuffix(".yml")
    return Templates(origin, task, file.labels, file.variables, file.templates)


class _PromptsourceLoader(yaml.SafeLoader):
    """Its tags name Python classes; here they are mappings, and the safe loader rejects any other tag."""


def _mapping(loader: yaml.SafeLoader, node: Any) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_PromptsourceLoader.add_constructor("!Template", _mapping)
_PromptsourceLoader.add_constructor("!TemplateMetadata", _mapping)


def _promptsource(text: str, origin: str) -> Templates:
    try:
        # A subclass of the safe loader.
        content = yaml.load(text, Loader=_PromptsourceLoader)
        listed = [
            PromptsourceTemplate(str(item["name"]), str(item["jinja"]), item.get("answer_choices") or None)
            for item in content["templates"].values()
        ]
        task = "/".join(str(content[key]) for key in ("dataset", "subset") if content.get(key))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{origin} looks like a template file of promptsource and cannot be read as one ({error}); it needs "
            "`templates`, a mapping of `!Template` entries with `name` and `jinja`"
        ) from error
    if not listed:
        raise ConfigError(f"{origin} has no template; give a file with at least one")
    return Templates(origin, task or origin, None, {}, tuple(listed))
