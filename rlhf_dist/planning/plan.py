"""A run on paper: its roles' memory, where they lie, how long an iteration takes, and whether all of it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.planning.hardware import Cluster
from rlhf_dist.planning.layout import Device, Layout, gpu_totals, host_totals, lay_out
from rlhf_dist.planning.memory import RoleMemory, role_memory
from rlhf_dist.planning.rates import Lengths, Rates
from rlhf_dist.planning.roles import AnyConfig, Role, Work, work_of
from rlhf_dist.planning.sync import Traffic, traffic
from rlhf_dist.planning.timeline import Timeline, timeline


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
        return timeline(self.work, self.layout, self.cluster, self.rates, self.lengths, self.memory)

    @cached_property
    def gpus(self) -> dict[Device, int]:
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
        devices = [device for device, need in self.gpus.items() if need > limit]
        full = {node for node, need in self.hosts.items() if host_limit is not None and need > host_limit}
        shares = self.layout.shares()
        devices += [device for device in shares if self.layout.nodes[device.slot] in full]
        names = {name for device in devices for name in shares[device]}
        return sorted(names, key=lambda name: -self.memory[name].gpu_bytes)

    @cached_property
    def problems(self) -> list[str]:
        """Why it does not fit; empty where it does."""
        found = [self.layout.misfit] if self.layout.misfit else []
        shares, limit = self.layout.shares(), self.cluster.gpu_memory_bytes
        seen = set()
        for device, need in self.gpus.items():
            roles = tuple(shares[device])
            if need > limit and roles not in seen:
                seen.add(roles)
                count = sum(tuple(others) == roles for others in shares.values())
                verb, where = "needs" if len(roles) == 1 else "need", f"each of {count} GPUs" if count > 1 else "1 GPU"
                found.append(f"{' + '.join(roles)} {verb} {need / 1e9:.1f} GB on {where} of {limit / 1e9:.1f} GB")
        if not found and (cramped := self._engines_without_room()):
            found.append(cramped)
        if self.lacks_host_memory:
            most, there = max(self.hosts.values()), self.cluster.host_memory_bytes or 0
            source = self.cluster.host_memory_source
            found.append(
                f"the ranks of a node need {most / 1e9:.1f} GB of its {there / 1e9:.1f} GB of host memory"
                + (f" ({source})" if source else "")
            )
        return found

    def _engines_without_room(self) -> str:
        """Why vLLM would not start on GPUs that hold all that is needed: it takes a part of a GPU, not what it needs."""
        limit = self.cluster.gpu_memory_bytes
        for name, needs in self.memory.items():
            if needs.engine is None or self.cluster.on_cpu:
                continue
            taken = needs.engine.taken(limit)
            key = f"{needs.role.key}.vllm_options"
            if not needs.engine.fit_at_once(limit):
                return (
                    f"gpu_memory_utilization of {name} gives its vLLM {taken / 1e9:.1f} GB of a GPU, which hold the KV cache "
                    f"of not even one response; raise it in {key}, or raise {needs.role.key}.tensor_parallel_size"
                )
            if (rest := limit - self.others_bytes(name)) < taken:
                return (
                    f"vLLM takes {taken / 1e9:.1f} GB of each GPU of {name} (gpu_memory_utilization), and the other roles "
                    f"there leave {rest / 1e9:.1f} GB; lower gpu_memory_utilization in {key}, or give {name} gpus_per_rank 1"
                )
        return ""

    def others_bytes(self, role: str) -> int:
        """That the other roles need on the fullest GPU of a role."""
        there = [roles for roles in self.layout.shares().values() if role in roles]
        return max((sum(self._beside(role, other) for other in roles if other != role) for roles in there), default=0)

    def _beside(self, role: str, other: str) -> int:
        """Bytes of a role while another generates: one that takes turns with it is asleep then."""
        needs = self.memory[other]
        both = needs.role.takes_turns and self.memory[role].role.takes_turns
        return needs.context_bytes if both else needs.gpu_bytes

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
                counts.append(max(0, role.num_engines - self.work.responses) * role.tensor_parallel_size)
            if counts and max(counts):
                idle[role.name] = max(counts)
        return idle

    @property
    def sync(self) -> Traffic | None:
        """Of a weight sync."""
        return traffic(self.work, self.layout, self.cluster)

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
        roles = tuple(_with_ranks(role, count / now) for role in plan.work.roles)
        per_node = min(plan.cluster.gpus_per_node, count)
        cluster = replace(plan.cluster, gpus_per_node=per_node, num_nodes=-(-count // per_node))
        plans.append(_plan(replace(plan.work, roles=roles), cluster, plan.rates, plan.lengths))
    return plans


def _with_ranks(role: Role, times: float) -> Role:
    """With whole engines."""
    number = max(1, round(role.num_engines * times)) * role.tensor_parallel_size
    return replace(role, hosting=role.hosting.model_copy(update={"num_ranks": number}))


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
