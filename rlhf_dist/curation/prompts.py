"""Prompts for models that make or judge data: Jinja files, built in or a user's own, in a sandbox."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.data.templates.sandbox import Sandbox, render


class PromptTemplate:
    """A prompt with gaps. It reaches no file and no code, and a name it is not given is rejected."""

    def __init__(self, path: Path | None, built_in: str) -> None:
        """The template at `path`, else the one called `built_in` in this package.

        Raises:
            ConfigError: it cannot be read, or is no Jinja template.
        """
        self.origin = str(path) if path else f"built-in {built_in}"
        try:
            text = (
                path.read_text("utf-8")
                if path
                else resources.files("rlhf_dist.curation").joinpath(built_in).read_text("utf-8")
            )
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompt_path {path} cannot be read ({error}); give a Jinja file in UTF-8") from error
        self.sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
        environment = Sandbox(trim_blocks=True)
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise self._rejection(error, f" in line {getattr(error, 'lineno', '?')}") from error

    def render(self, values: Mapping[str, Any]) -> str:
        """The prompt, without the white space around it.

        Raises:
            ConfigError: it uses a name that is not among `values`, does what it may not, or comes out empty.
        """
        try:
            text = render(self._template, values).strip()
        except Exception as error:  # whatever a template's own expressions raise
            raise self._rejection(error, f"; it is given {', '.join(values)}") from error
        if not text:
            raise ConfigError(f"the prompt {self.origin} comes out empty; write what the model is asked")
        return text

    def _rejection(self, error: Exception, more: str) -> ConfigError:
        return ConfigError(f"the prompt {self.origin} cannot be used ({type(error).__name__}: {error}{more}); fix it")
