"""The machines that a run is planned for, and those that an earlier run was on."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from dataclasses import replace
from typing import Any

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.distributed.ray.placement import plan_placement
from rlhf_dist.planning.hardware import GPUS, HOST_BYTES_PER_GPU, Cluster, gpu_named, parse_bytes
from rlhf_dist.planning.roles import AnyConfig, work_of

_GPUS_PER_NODE = 8
"""Assumed where nothing is said and this machine has none."""


def cluster_of(config: AnyConfig, options: Namespace) -> Cluster:
    """The machines to plan for: as the options say, else what the placement asks for and what this machine has."""
    import psutil
    import torch

    asked = options.gpus or options.nodes or options.gpu_memory or options.gpu_type
    here = torch.cuda.device_count()
    host = parse_bytes(options.cpu_memory, "--cpu-memory") if options.cpu_memory else None
    if not asked and (config.device == "cpu" or (config.device == "auto" and not here)):
        gpu = GPUS["cpu"]
        return Cluster(gpu, 1, options.nodes or 1, gpu.memory_bytes, host or psutil.virtual_memory().total)
    gpu = gpu_named(options.gpu_type, "--gpu-type") if options.gpu_type else _gpu_here(torch) if here else GPUS["h100"]
    memory = parse_bytes(options.gpu_memory, "--gpu-memory") if options.gpu_memory else gpu.memory_bytes
    needed = _gpus_asked_for(config)
    per_node = options.gpus or (here if here and not options.nodes else min(_GPUS_PER_NODE, needed))
    nodes = options.nodes or (-(-needed // per_node) if not options.gpus else 1)
    if host is None and here and not asked:  # it is about this machine
        host = psutil.virtual_memory().total
    return Cluster(gpu, per_node, nodes, memory, host or HOST_BYTES_PER_GPU * per_node, host is None)


def _gpus_asked_for(config: AnyConfig) -> int:
    if config.cluster == "inline":
        return 1
    placements = {role.name: role.placement for role in work_of(config).roles}
    return math.ceil(plan_placement(placements, "cuda").total_gpus)


def _gpu_here(torch: Any) -> Any:
    properties = torch.cuda.get_device_properties(0)
    name = properties.name.lower()
    known = max(GPUS.values(), key=lambda gpu: sum(word.lower() in name for word in gpu.name.split()[:1]))
    return replace(known, name=properties.name, memory_bytes=properties.total_memory)


def measured_cluster(config: AnyConfig, said: str | None) -> Cluster:
    """The machines that the run of `config` was on, by `--measured-on`: a run does not write down what they are.

    Raises:
        ConfigError: it is not said, or cannot be.
    """
    if said is None and config.device != "cpu":
        where = "on GPUs" if config.device == "cuda" else "with device auto"
        cpu = "" if config.device == "cuda" else ", or --measured-on cpu"
        raise ConfigError(
            f"the run of --rates was {where}; say which with --measured-on TYPE{cpu}, as its times are compared with what "
            f"such GPUs should take ({', '.join(GPUS)})"
        )
    match = re.fullmatch(r"([^:]+)(?::([1-9]\d*)x([1-9]\d*))?", said or "cpu")
    if match is None:
        raise ConfigError(f"--measured-on is {said!r}; write TYPE or TYPE:NODESxGPUS such as h100:2x8")
    gpu = gpu_named(match[1], "--measured-on")
    on_cpu = gpu is GPUS["cpu"]
    if config.device != "auto" and on_cpu != (config.device == "cpu"):
        raise ConfigError(f"--measured-on says {match[1]} and the run's device is {config.device}; name what it was on")
    if match[2]:
        return Cluster(gpu, int(match[3]), int(match[2]), gpu.memory_bytes)
    if on_cpu:
        return Cluster(gpu, 1, 1, gpu.memory_bytes)
    needed = _gpus_asked_for(config)
    per_node = min(_GPUS_PER_NODE, needed)
    return Cluster(gpu, per_node, -(-needed // per_node), gpu.memory_bytes)
