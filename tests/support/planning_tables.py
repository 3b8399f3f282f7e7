"""The tables of `rlhf-dist plan` that launch/README.md shows, between its markers.

    python tests/support/planning_tables.py

writes them anew. From the repository root, as the command would be given.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rlhf_dist.planning import command, tables
from rlhf_dist.planning.plan import scaled

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "launch" / "README.md"
BEGIN, END = "<!-- plans -->\n", "<!-- end of plans -->\n"
SHOWN = {
    "8B on 8 × 80 GB": ["launch/recipes/llama_8b_ppo.yaml", "--gpus", "8", "--gpu-memory", "80GB"],
    "8B on 64 × 80 GB": [
        "launch/recipes/llama_8b_ppo_64gpu.yaml",
        "--gpus",
        "8",
        "--nodes",
        "8",
        "--gpu-memory",
        "80GB",
    ],
    "70B on 64 × 80 GB": ["launch/recipes/llama_70b_ppo.yaml", "--gpus", "8", "--nodes", "8", "--gpu-memory", "80GB"],
}
SCALE = {"8B on 64 × 80 GB": [8, 64, 512, 4096]}


def section() -> str:
    """All tables, with the commands that print them (and more)."""
    parts = []
    for title, arguments in SHOWN.items():
        options = argparse.Namespace(
            gpus=8,
            nodes=int(arguments[arguments.index("--nodes") + 1]) if "--nodes" in arguments else 1,
            gpu_memory="80GB",
            gpu_type=None,
            cpu_memory=None,
            rates=None,
            measured_on=None,
            mean_prompt_tokens=None,
            mean_response_tokens=None,
        )
        plan, _ = command.planned(command.load("ppo", Path(arguments[0]), []), options)
        shown = [tables.memory(plan), tables.shares(plan)]
        if any(needs.engine for needs in plan.memory.values()):
            shown += [*tables.rollouts(plan), tables.traffic(plan)]
        shown.append(tables.times(plan))
        words = arguments
        if title in SCALE:
            words = [*arguments, "--scale", ",".join(map(str, SCALE[title]))]
            shown.append(tables.scaling(scaled(plan, SCALE[title])))
        parts.append(
            "\n\n".join([f"### {title}", f"    rlhf-dist plan {' '.join(words)}", *map(command.markdown, shown)])
        )
    return "\n\n".join(parts) + "\n"


def written(text: str) -> str:
    """What stands between the markers."""
    return text.split(BEGIN)[1].split(END)[0]


def main() -> None:
    """Write the section."""
    os.chdir(ROOT)
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(written(text), section()), encoding="utf-8")


if __name__ == "__main__":
    main()
