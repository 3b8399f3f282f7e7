"""Break the product on purpose and see which tests notice.

    python tests/support/mutations.py            all of them, about three minutes each; writes the table of tests/README.md
    python tests/support/mutations.py "mask"     those whose name contains a text; writes nothing

Each mutation is made in a copy of the last commit; the checkout is never touched. The unit tests of the
formulas and `tests/golden` run to their end, `tests/invariants` (what `pytest` alone runs of it) up to its first failure.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "tests" / "README.md"
UNIT = ("tests/unit/core", "tests/unit/ppo", "tests/unit/reward")
START, END = "<!-- mutations -->\n", "<!-- end of mutations -->"


class Mutation(NamedTuple):
    """A mistake."""

    name: str
    edits: list[tuple[str, str, str]]
    """(file under rlhf_dist/, text that is in it once, what replaces it)."""


_POLICY, _TRAIN = "ppo/policy_worker.py", "distributed/deepspeed/train.py"

MUTATIONS = [
    Mutation(
        "mask shift: log-probs of the token after",
        [
            (
                "models/forward.py",
                "keep = torch.arange(first - 1, tokens.shape[1] - 1, device=tokens.device)",
                "keep = torch.arange(first, tokens.shape[1], device=tokens.device)",
            )
        ],
    ),
    Mutation(
        "score position: read one token early",
        [
            (
                "models/forward.py",
                "return scalars.gather(1, lengths[:, None] - 1).squeeze(1)",
                "return scalars.gather(1, (lengths[:, None] - 2).clamp(min=0)).squeeze(1)",
            )
        ],
    ),
    Mutation(
        "score position: paid one token late",
        [
            (
                "ppo/rewards.py",
                "last = response_mask.sum(1) - 1",
                "last = response_mask.sum(1).clamp(max=response_mask.shape[1] - 1)",
            )
        ],
    ),
    Mutation(
        "GAE through padding",
        [
            (
                "ppo/advantages.py",
                "rewards, values = torch.where(response_mask, rewards, 0.0), torch.where(response_mask, values, 0.0)",
                "pass",
            ),
            ("ppo/advantages.py", "torch.where(is_last[:, t], ends, next_value)", "next_value"),
            (
                "ppo/advantages.py",
                "(delta + gamma * gae_lambda * next_advantage) * keep[:, t]",
                "delta + gamma * gae_lambda * next_advantage",
            ),
        ],
    ),
    Mutation(
        "loss divided by the number of micro-batches, too",
        [(_TRAIN, "self.world_size / term.global_count", "self.world_size / term.global_count / len(work)")],
    ),
    Mutation(
        "advantages whitened per rank",
        [
            (
                _POLICY,
                "reports: list[StepReport] = []",
                "from dataclasses import replace\n\n"
                "        from rlhf_dist.core.masking import masked_whiten\n\n"
                "        white = masked_whiten(experience.advantages, experience.response_mask)\n"
                "        experience, reports = replace(experience, advantages=white), []",
            )
        ],
    ),
    Mutation(
        "temperature missing from the new log-probs",
        [(_POLICY, "targets, self.temperature, True)", "targets, 1.0, True)")],
    ),
    Mutation(
        "temperature missing from the old log-probs",
        [
            (
                _POLICY,
                "response_logprobs(self.engine, rollout, micro_batches, self.temperature)",
                "response_logprobs(self.engine, rollout, micro_batches, 1.0)",
            )
        ],
    ),
    Mutation(
        "PTX counted with the PPO tokens",
        [
            (
                _POLICY,
                'self.nll_term("ptx", texts, step.num_ptx_targets,',
                'self.nll_term("ptx", texts, step.num_tokens,',
            )
        ],
    ),
]


def mutate(package: Path, mutation: Mutation) -> None:
    """Make the edits. Raises ValueError where a text does not are in its file exactly once."""
    for name, old, new in mutation.edits:
        text = (package / name).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{mutation.name}: {old!r} occurs {text.count(old)} times in {name}; fix the mutation")
        (package / name).write_text(text.replace(old, new), encoding="utf-8")


def caught_by(mutation: Mutation | None) -> list[str]:
    """Names of the tests that fail with a mutation (with none: of those that fail anyway)."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "rlhf_dist"
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(copy, filter="data")
        if mutation is not None:
            mutate(copy / "rlhf_dist", mutation)
        found = []
        for options in ([*UNIT, "tests/golden"], ["-x", "tests/invariants"]):
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
            result = subprocess.run(
                command, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True
            )
            if result.returncode not in (0, 1):
                raise RuntimeError(f"pytest could not run:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
            lines = re.findall(r"^(?:FAILED|ERROR) tests/(\S+?)\.py::(\w+)", result.stdout, re.MULTILINE)
            found += [f"{path}: {test}" for path, test in lines]
        return list(dict.fromkeys(found))


def table(results: dict[str, list[str]]) -> str:
    """Markdown."""
    lines = ["| mutation | caught by |", "|---|---|"]
    for name, tests in results.items():
        shown = "; ".join(f"`{test}`" for test in tests[:4])
        more = f" and {len(tests) - 4} more" if len(tests) > 4 else ""
        lines.append(f"| {name} | {shown}{more} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the mutations asked for; 1 if one was not caught, or if the tests fail without any."""
    if START not in README.read_text(encoding="utf-8"):
        print(f"{README} has no line {START.strip()} for the table to go to; put it back, with {END}")
        return 1
    wanted = [mutation for mutation in MUTATIONS if not sys.argv[1:] or sys.argv[1] in mutation.name]
    if healthy := caught_by(None):
        print("these tests fail without any mutation:", *healthy, sep="\n  ")
        return 1
    results = {}
    for mutation in wanted:
        results[mutation.name] = caught_by(mutation)
        print(f"{mutation.name}: {', '.join(results[mutation.name]) or 'NOT CAUGHT'}", flush=True)
    if not sys.argv[1:]:
        before, rest = README.read_text(encoding="utf-8").split(START)
        README.write_text(f"{before}{START}{table(results)}{END}{rest.split(END)[1]}", encoding="utf-8")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
