"""What the commands' arguments share: the parser, and the configuration with its overrides."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

from rlhf_dist.core.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_dist.evaluation.config import EvalConfig
    from rlhf_dist.pipeline.config import PipelineConfig
    from rlhf_dist.ppo.config import PPOConfig
    from rlhf_dist.reward.config import RewardConfig
    from rlhf_dist.sft.config import SFTConfig

PROG = "rlhf-dist"
INTERRUPTED = 130
"""Exit code of a process ended by Ctrl-C, by the convention of shells (128 + SIGINT)."""

CONFIG_COMMANDS = {
    "sft": "supervised fine-tuning of a language model (or pretraining on plain text)",
    "reward": "train a reward model on preferences (pairs, rankings, ratings)",
    "ppo": "fine-tune a policy with PPO against a reward model",
    "eval": "measure a policy and/or a reward model on held-out records",
    "pipeline": "data, SFT, reward model, PPO and evaluation from one file; what is done is skipped, what is half done resumed",
}


class Parser(argparse.ArgumentParser):
    """Rejects in the words of every other configuration error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}. See `{self.prog} --help`.")


def schema_of(command: str) -> type[Any]:
    """The configuration schema of a command with a configuration."""
    from rlhf_dist.evaluation.config import EvalConfig
    from rlhf_dist.pipeline.config import PipelineConfig
    from rlhf_dist.ppo.config import PPOConfig
    from rlhf_dist.reward.config import RewardConfig
    from rlhf_dist.sft.config import SFTConfig

    schemas = {
        "sft": SFTConfig,
        "reward": RewardConfig,
        "ppo": PPOConfig,
        "eval": EvalConfig,
        "pipeline": PipelineConfig,
    }
    return schemas[command]


@overload
def load_config(command: Literal["sft"], path: str | Path | None, overrides: Sequence[str] = ()) -> SFTConfig: ...
@overload
def load_config(command: Literal["reward"], path: str | Path | None, overrides: Sequence[str] = ()) -> RewardConfig: ...
@overload
def load_config(command: Literal["ppo"], path: str | Path | None, overrides: Sequence[str] = ()) -> PPOConfig: ...
@overload
def load_config(command: Literal["eval"], path: str | Path | None, overrides: Sequence[str] = ()) -> EvalConfig: ...
@overload
def load_config(
    command: Literal["pipeline"], path: str | Path | None, overrides: Sequence[str] = ()
) -> PipelineConfig: ...
def load_config(command: str, path: str | Path | None, overrides: Sequence[str] = ()) -> Any:
    """The checked configuration of a command.

    Args:
        command: `sft`, `reward`, `ppo`, `eval` or `pipeline`.
        path: a YAML file; None: no file, `overrides` alone.
        overrides: as on the command line, e.g. ["--ppo.kl_coef", "0.1", "--seed=3"].

    Raises:
        ConfigError: every problem, each with its key, value, constraint and remedy.
    """
    from rlhf_dist.config import load as loader

    return loader.load_config(schema_of(command), Path(path) if path is not None else None, overrides)


def load(command: str, prog: str, arguments: list[str]) -> Any | None:
    """The checked configuration, or None when help was asked for and printed."""
    return load_schema(schema_of(command), prog, arguments, command)


def load_schema(schema: type[Any], prog: str, arguments: list[str], name: str) -> Any | None:
    """As `load`, for a schema that is known; `name` is what `rlhf-dist schema` calls it."""
    from rlhf_dist.config.load import load_config, overrides_help

    usage = f"{prog} CONFIG.yaml [--section.key value ...]"
    if not arguments:
        raise ConfigError(f"{prog} needs a configuration file: {usage}. See `{prog} --help`.")
    if any(a in ("-h", "--help") for a in arguments):
        epilog = (
            "The keys above are those of the YAML file; on the command line they override it. Relative paths are\n"
            "relative to the current directory. `null` clears a value; lists and mappings are JSON or YAML in quotes.\n"
            f"`{PROG} schema {name}` prints a JSON schema for editors."
        )
        print(overrides_help(schema, prog=prog, usage=usage, epilog=epilog), end="")
        return None
    path = None if arguments[0].startswith("-") else Path(arguments[0])
    return load_config(schema, path, arguments if path is None else arguments[1:])
