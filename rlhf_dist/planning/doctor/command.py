"""`rlhf-dist doctor`: what works on this machine, what does not, and what to do."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from rlhf_dist.core.errors import RlhfDistError
from rlhf_dist.planning.doctor.findings import VERDICTS, Finding, run_check

SHORT_S, IMPORT_S = 15.0, 60.0
"""Longest times of a check; the latter for one that imports torch, DeepSpeed or Ray, perhaps from a slow disk."""

CHECKS = (
    ("system", "rlhf_dist.planning.doctor.environment:check_python", SHORT_S),
    ("packages", "rlhf_dist.planning.doctor.environment:check_packages", SHORT_S),
    ("torch", "rlhf_dist.planning.doctor.torch_checks:check_torch", IMPORT_S),
    ("torch", "rlhf_dist.planning.doctor.torch_checks:check_collectives", IMPORT_S),
    ("DeepSpeed", "rlhf_dist.planning.doctor.torch_checks:check_deepspeed", IMPORT_S),
    ("Ray", "rlhf_dist.planning.doctor.ray_checks:check_token", SHORT_S),
    ("Ray", "rlhf_dist.planning.doctor.ray_checks:check_address", IMPORT_S),
    ("vLLM", "rlhf_dist.planning.doctor.environment:check_vllm", 3.5 * IMPORT_S),
    ("tracking", "rlhf_dist.planning.doctor.wandb_checks:check_wandb", SHORT_S),
    ("hub", "rlhf_dist.planning.doctor.environment:check_hub", SHORT_S),
    ("disk and memory", "rlhf_dist.planning.doctor.machine:check_disk", SHORT_S),
    ("limits", "rlhf_dist.planning.doctor.machine:check_limits", SHORT_S),
    ("network", "rlhf_dist.planning.doctor.machine:check_network", SHORT_S),
    ("Slurm", "rlhf_dist.planning.doctor.environment:check_slurm", 2 * SHORT_S),
)
"""(section, `module:function`, longest time in seconds). A module is imported when its turn comes."""

DEEP_CHECKS = (
    ("deep", "rlhf_dist.planning.doctor.torch_checks:check_all_reduce", 150.0),
    ("deep", "rlhf_dist.planning.doctor.ray_checks:check_private_ray", 150.0),
)
"""What starts processes, and takes half a minute."""


def examine(deep: bool) -> list[Finding]:
    """All findings, in the order of the report."""
    found: list[Finding] = []
    for section, place, timeout_s in CHECKS + (DEEP_CHECKS if deep else ()):
        found += run_check(section, partial(_check, place), timeout_s)
    return found


def _check(place: str) -> Sequence[Finding]:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)()


def run(*, deep: bool, as_json: bool) -> None:
    """Print the report.

    Raises:
        RlhfDistError: a finding is an error.
    """
    found = examine(deep)
    counts = Counter(finding.verdict for finding in found)
    if as_json:
        print(
            json.dumps({"findings": [asdict(f) for f in found], "counts": {v: counts[v] for v in VERDICTS}}, indent=2)
        )
    else:
        print_report(found)
        print(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS))
    if counts["error"]:
        names = ", ".join(finding.name for finding in found if finding.verdict == "error")
        raise RlhfDistError(
            f"{counts['error']} of {len(found)} checks found an error ({names}); do what their lines say"
        )


def print_report(found: Sequence[Finding]) -> None:
    """A line each, and below it what to do."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    styles = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}
    section = None
    for finding in found:
        if finding.section != section:
            section = finding.section
            console.print(Text(f"\n{section}" if finding is not found[0] else section, style="bold"))
        console.print(
            Text("  ")
            + Text(f"{finding.verdict:<8}", style=styles[finding.verdict])
            + Text(f"{finding.name}: {finding.found}")
        )
        if finding.remedy:
            console.print(Text(f"          → {finding.remedy}"))
    console.print()
