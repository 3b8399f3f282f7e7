"""A run on paper: its roles' memory, where they lie, how long an iteration takes, and whether all of it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.distributed.ray.placement import Slot
from rlhf_dist.planning.hardware import Cluster
from rlhf_dist.planning.layout import Layout, gpu_totals, host_totals, lay_out
from rlhf_dist.planning.memory import RoleMemory, role_memory
from rlhf_dist.planning.roles import AnyConfig, Role, Work, work_of
from rlhf_dist.planning.timeline import Lengths, Rates, Timeline, timeline


@dataclass(frozen=True)
class Plan:
    """Everything that can be said before anything starts."""

    work: Work
    cluster: Cluster
    rates: Rates
    lengths: Lengths
    memory: dict[str, RoleMemory]
    """Role → its needs."""
    layout: Layout

    @cached_property
    def timeline(self) -> Timeline:
        """Of one iteration."""
        return timeline(self.work, self.layout, self.cluster, self.rates, self.lengths)

    @cached_property
    def gpus(self) -> dict[Slot, int]:
        """GPU → bytes that the roles on it need."""
        return {} if self.cluster.on_cpu else gpu_totals(self.layout, self.memory)

    @cached_property
    def hosts(self) -> dict[int, int]:
        """Node → bytes of host memory."""
        return host_totals(self.layout, self.memory, self.cluster.on_cpu)

    @property
    def crowded(self) -> list[str]:
        """Roles on GPUs, or nodes, that hold too little, those that need the most first."""
        limit, host_limit = self.cluster.gpu_memory_bytes, self.cluster.host_memory_bytes
        slots = [slot for slot, need in self.gpus.items() if need > limit]
        full = {node for node, need in self.hosts.items() if host_limit is not None and need > host_limit}
        slots += [slot for slot, node in self.layout.nodes.items() if node in full]
        shares = self.layout.shares()
        names = {name for slot in slots for name in shares[slot]}
        return sorted(names, key=lambda name: -self.memory[name].gpu_bytes)

    @cached_property
    def problems(self) -> list[str]:
        """Why it does not fit; empty where it does."""
        found = [self.layout.misfit] if self.layout.misfit else []
        shares, limit = self.layout.shares(), self.cluster.gpu_memory_bytes
        seen = set()
        for slot, need in self.gpus.items():
            roles = tuple(shares[slot])
            if need > limit and roles not in seen:
                seen.add(roles)
                count = sum(tuple(others) == roles for others in shares.values())
                verb, where = "needs" if len(roles) == 1 else "need", f"each of {count} GPUs" if count > 1 else "1 GPU"
                found.append(f"{' + '.join(roles)} {verb} {need / 1e9:.1f} GB on {where} of {limit / 1e9:.1f} GB")
        if self.lacks_host_memory:
            most, there = max(self.hosts.values()), self.cluster.host_memory_bytes or 0
            source = self.cluster.host_memory_source
            found.append(
                f"the ranks of a node need {most / 1e9:.1f} GB of its {there / 1e9:.1f} GB of host memory"
                + (f" ({source})" if source else "")
            )
        return found

    @property
    def lacks_host_memory(self) -> bool:
        """Whether a node's ranks need more of it than there is, as far as that is known."""
        limit = self.cluster.host_memory_bytes
        return limit is not None and max(self.hosts.values(), default=0) > limit

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.problems

    @property
    def idle_ranks(self) -> dict[str, int]:
        """Role → ranks that have no sequence in a step, a batch of scores, or of prompts; where there are any."""
        idle = {}
        for role in self.work.roles:
            counts = [role.idle_ranks(passes) for passes in (*role.update, *([role.score] if role.score else []))]
            if role.rollout is not None:
                counts.append(max(0, role.num_ranks - self.work.responses))
            if counts and max(counts):
                idle[role.name] = max(counts)
        return idle

    @property
    def sync_bytes(self) -> int:
        """That the object store takes in for one weight sync, and hands to the nodes of engines (once a node)."""
        policy, rollout = self.memory.get("policy"), self.memory.get("rollout")
        if policy is None or rollout is None or self.work.command != "ppo":
            return 0
        other_nodes = len(set(self.layout.nodes_of("rollout")) - {self.layout.nodes_of("policy")[0]})
        return policy.model_bytes * (1 + other_nodes)

    @property
    def batch_bytes(self) -> int:
        """Of tokens, log-probs and values that pass the object store in an iteration, the weights not counted."""
        if not self.work.responses:
            steps = [passes for role in self.work.roles for passes in role.update]
            return sum(passes.sequences * (passes.length * 9 + 8) for passes in steps)
        tokens = 8 * (self.work.prompt + self.work.response)
        numbers = 4 * self.work.response
        prompts, rollout = 8 * self.work.prompt, tokens + numbers
        scored = sum(rollout + numbers for role in self.work.roles if role.score)
        updated = sum(tokens + 5 * numbers for role in self.work.roles if role.update)
        return self.work.responses * (prompts + rollout + scored + updated)


def plan_run(
    config: AnyConfig,
    cluster: Cluster,
    rates: Rates | None = None,
    mean_prompt: float | None = None,
    mean_response: float | None = None,
) -> Plan:
    """Plan a run.

    Args:
        mean_prompt: expected prompt length in tokens; the longest where None.
        mean_response: expected response length in tokens; the longest where None.

    Raises:
        ModelError: a model's config cannot be read or built.
        ConfigError: roles share a GPU and ask for more than one.
    """
    work = work_of(config)
    prompt = work.prompt if mean_prompt is None else mean_prompt
    response = work.response if mean_response is None else mean_response
    lengths = Lengths(prompt, response, work.response)
    return _plan(work, cluster, rates or Rates(), lengths)


def _plan(work: Work, cluster: Cluster, rates: Rates, lengths: Lengths) -> Plan:
    memory = {role.name: role_memory(role, work) for role in work.roles}
    return Plan(work, cluster, rates, lengths, memory, lay_out(work.roles, cluster))


def scaled(plan: Plan, num_gpus: Sequence[int]) -> list[Plan]:
    """The run with its roles' ranks in proportion on other numbers of GPUs, the global batch as it is."""
    now = plan.layout.placement.total_gpus or 1
    plans = []
    for count in num_gpus:
        roles = tuple(_with_ranks(role, max(1, round(role.num_ranks * count / now))) for role in plan.work.roles)
        per_node = min(plan.cluster.gpus_per_node, count)
        cluster = replace(plan.cluster, gpus_per_node=per_node, num_nodes=-(-count // per_node))
        plans.append(_plan(replace(plan.work, roles=roles), cluster, plan.rates, plan.lengths))
    return plans


def _with_ranks(role: Role, num_ranks: int) -> Role:
    return replace(role, hosting=role.hosting.model_copy(update={"num_ranks": num_ranks}))


def parse_counts(text: str) -> list[int]:
    """`8,64,512`.

    Raises:
        ConfigError: something that is no positive whole number.
    """
    try:
        counts = [int(part.replace("_", "")) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise ConfigError(f"--scale is {text!r}; write numbers of GPUs such as 8,64,512,4096")
    return counts
