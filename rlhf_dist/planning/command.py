"""`rlhf-dist plan`: what a run needs, before anything starts. It reads the configuration and the models' config.json alone."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_dist.config.interpolation import STAGES, Interpolation
from rlhf_dist.config.load import load_config
from rlhf_dist.config.yaml_file import read_mapping
from rlhf_dist.core.errors import ConfigError, PlacementError
from rlhf_dist.pipeline.config import PipelineConfig
from rlhf_dist.pipeline.stage_config import stage_config
from rlhf_dist.planning import calibration, suggest, tables
from rlhf_dist.planning.allowances import CONTEXT_BYTES
from rlhf_dist.planning.hardware import Cluster
from rlhf_dist.planning.machines import cluster_of, measured_cluster
from rlhf_dist.planning.plan import Plan, parse_counts, plan_run, scaled
from rlhf_dist.planning.rates import Rates
from rlhf_dist.planning.roles import AnyConfig
from rlhf_dist.run.console import print_table


def run(command: str | None, path: Path, options: Namespace, overrides: Sequence[str]) -> None:
    """Plan the run that `path` and `overrides` describe, and print it.

    Raises:
        PlacementError: it does not fit (all tables are printed before).
        RlhfDistError: the configuration, a model's config or an option is wrong.
    """
    command = command or recognized(path)
    config = load(command, path, overrides)
    if command != "pipeline":
        data, problem = report(config, options)
        problems = [problem]
    else:
        data, problems = {}, []
        for name, stage in planning_configs(config).items():
            if options.format != "json":
                print(f"## {name}\n" if options.format == "markdown" else f"{name}\n")
            data[name], problem = report(stage, options)
            problems.append(problem and f"{name}: {problem}")
    if options.format == "json":
        print(json.dumps(data, indent=2))
    if any(problems):
        raise PlacementError(" ".join(problem for problem in problems if problem))


def planning_configs(pipeline: PipelineConfig) -> dict[str, Any]:
    """Stage → what its command would be given, with the model that it starts from in place of one that is not trained yet: on
    paper they are the same."""
    configs: dict[str, Any] = {}

    def locate(found: Interpolation) -> list[Path]:
        if found.stage == "data":
            return [Path(str(found))]  # data is not read
        config = configs[found.stage]
        return [Path((config.policy if found.stage == "ppo" else config.model).model_path)]

    for name in pipeline.stages:
        if name != "data":
            configs[name] = stage_config(pipeline, name, locate, pipeline.run_dir)
    return configs


def report(config: AnyConfig, options: Namespace) -> tuple[dict[str, Any], str]:
    """Plan a run and, unless as JSON, print it: (all numbers, why it does not fit or "")."""
    plan, replan = planned(config, options)
    found = suggest.Counted(replan)
    counts = parse_counts(options.scale) if options.scale else []
    scale = scaled(plan, counts) if counts else []
    changes = [] if plan.fits else suggest.sufficient_changes(config, plan, found)
    placements = suggest.placements(config, plan, found) if not plan.fits or options.suggest else []
    data = tables.as_data(plan, scale)
    data["sufficient_changes"] = [one.overrides for one in changes]
    data["placements"] = [_placement_data(one) for one in placements[:_MOST_PLACEMENTS]]
    if options.format != "json":
        shown = tables.tables(plan) + ([tables.scaling(scale)] if scale else [])
        shown += suggested(plan, changes, placements)
        show(shown, options.format)
    if plan.fits:
        return data, ""
    best = (changes or placements)[:1]
    remedy = f"It would with: {' '.join(best[0].overrides)}" if best else _no_remedy(plan, found.number)
    return data, f"the run does not fit: {'; '.join(plan.problems)}. {remedy}."


_MOST_PLACEMENTS = 2


def planned(config: AnyConfig, options: Namespace) -> tuple[Plan, Any]:
    """The plan, and the function that plans another configuration on the same machines."""
    cluster = cluster_of(config, options)
    again = partial(
        plan_run,
        cluster=cluster,
        rates=rates_of(options, cluster),
        mean_prompt=options.mean_prompt_tokens,
        mean_response=options.mean_response_tokens,
    )
    return again(config), again


def load(command: str, path: Path, overrides: Sequence[str]) -> Any:
    """The checked configuration."""
    from rlhf_dist.pipeline.arguments import schema_of

    return load_config(schema_of(command), path, overrides)


def recognized(path: Path) -> str:
    """The command that a configuration file is for, by its sections.

    Raises:
        ConfigError: its sections are no command's.
    """
    keys = read_mapping(path)[0]
    data = keys.get("data")
    data = data if isinstance(data, Mapping) else {}
    stages = [keys.get(name) for name in STAGES if name != "data"]
    if "sets" in data or any(isinstance(stage, Mapping) and "data" in stage for stage in stages):
        return "pipeline"
    if {"ppo", "value"} & keys.keys():
        return "ppo"
    if "sft" in keys:
        return "sft"
    if "model" in keys:
        kinds = {source.get("kind") for source in data.get("train") or () if isinstance(source, Mapping)}
        return "reward" if "reward" in keys or kinds & {"preference", "ratings"} else "sft"
    if {"instructions", "preferences"} & data.keys() or ("policy" in keys and "reward" not in keys):
        return "eval"
    if {"policy", "reward"} <= keys.keys():
        return "ppo"
    raise ConfigError(
        f"{path} has the sections {', '.join(keys) or 'none'}, by which no command is recognized; name it: rlhf-dist plan "
        "{sft,reward,ppo,eval,pipeline} CONFIG"
    )


def rates_of(options: Namespace, cluster: Cluster) -> Rates:
    """Assumed, of a JSON file, or measured by a run.

    Raises:
        ConfigError: there are none at that path, or it was a run that says nothing of `cluster`.
    """
    path = options.rates
    is_run = path is not None and path.suffix != ".json"
    if options.measured_on is not None and not is_run:
        raise ConfigError("--measured-on says where the run of --rates RUN_DIR was, and no run is given; leave it out")
    if path is None:
        return Rates()
    if not path.exists():
        raise ConfigError(f"--rates {path} does not exist; give a JSON file of rates, or the folder of a run")
    if not is_run:
        return calibration.read_rates(path)
    metrics = path / "metrics.jsonl" if path.is_dir() else path
    settings = metrics.parent / "config.yaml"
    command = recognized(settings)
    if command == "pipeline":
        raise ConfigError(
            f"--rates {path} is a pipeline's; give the folder of one of its stages, such as {path / 'ppo'}"
        )
    config = load(command, settings, [])
    there = measured_cluster(config, options.measured_on)
    if there.on_cpu != cluster.on_cpu:
        one, other = ("CPUs", "GPUs") if there.on_cpu else ("GPUs", "CPUs")
        raise ConfigError(
            f"--rates {path}: the run was on {one}, whose rates say nothing of {other}; give a run on {other}, or leave "
            "--rates out"
        )
    return calibration.calibrated(metrics, config, there, options.mean_prompt_tokens)


def suggested(
    plan: Plan, changes: Sequence[suggest.Suggestion], placements: Sequence[suggest.Suggestion]
) -> list[tables.Table]:
    """What would make it fit, and other placements; each was planned again, and fits."""
    shown = []
    if changes:
        rows = [_row(one) for one in changes]
        shown.append(tables.Table("It would fit with", ("overrides", "fullest GPU, GB", "iteration, s"), rows))
    if placements:
        rows = [_row(one) for one in placements[:_MOST_PLACEMENTS]]
        title = f"Placements that fit on {plan.cluster.num_nodes} × {plan.cluster.gpus_per_node} GPUs"
        shown.append(tables.Table(title, ("overrides", "fullest GPU, GB", "iteration, s"), rows))
    return shown


def _row(one: suggest.Suggestion) -> tuple[str, str, str]:
    # The fastest placement may be the one that the configuration has.
    words = " ".join(one.overrides) or "as it is"
    return words, _fullest(one.plan), tables.duration(one.plan.timeline.total)


def _fullest(plan: Plan) -> str:
    return tables.gigabytes(max(plan.gpus.values(), default=0) or max(plan.hosts.values()))


def _placement_data(one: suggest.Suggestion) -> dict[str, Any]:
    return {"overrides": one.overrides, "iteration_s": one.plan.timeline.total}


def _no_remedy(plan: Plan, number: int) -> str:
    gpus = "more or larger GPUs"
    if _whole_copies_do_not_fit(plan):
        divided = any(role.rollout and role.rollout.engine == "hf" and not role.inline for role in plan.work.roles)
        gpus = "larger GPUs" + (" (or engine vllm, which divides a copy by tensor_parallel_size)" if divided else "")
    needed = [gpus] if len(plan.problems) > plan.lacks_host_memory else []
    needed += ["nodes with more host memory"] if plan.lacks_host_memory else []
    return f"None of the {number} other configurations that were planned fits; use {' and '.join(needed)}"


def _whole_copies_do_not_fit(plan: Plan) -> bool:
    """Whether a role that no number of GPUs divides (an engine of transformers, a role hosted inline) is too large for one."""
    whole = [
        one for one in plan.memory.values() if (one.role.rollout is not None and not one.engine) or one.role.inline
    ]
    least = [min(items["parameters"].gpu for items in one.phases.values()) + CONTEXT_BYTES for one in whole]
    return not plan.cluster.on_cpu and max(least, default=0) > plan.cluster.gpu_memory_bytes


def show(shown: Sequence[tables.Table], form: str) -> None:
    """For the terminal, or as Markdown."""
    if form == "markdown":
        print("\n\n".join(markdown(table) for table in shown))
        return
    for table in shown:
        print_table(table.title, table.rows, table.header)
        if table.note:
            print(f"{table.note}\n")


def markdown(table: tables.Table) -> str:
    """A table in GitHub's Markdown, its title in bold above and its note below."""
    lines = [f"**{table.title}**", "", "| " + " | ".join(table.header) + " |", "|" + "---|" * len(table.header)]
    lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    return "\n".join(lines + (["", table.note] if table.note else []))
