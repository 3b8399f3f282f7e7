"""A configuration as planning sees it: roles, and how much each has to do in an iteration (in a supervised run: in a step)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from rlhf_dist.config.hosting import FrozenModel, ModelHost, Placement, Precision, TrainedModel
from rlhf_dist.evaluation.config import EvalConfig
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.rollout.config import RolloutConfig
from rlhf_dist.sft.config import SFTConfig

if TYPE_CHECKING:
    from rlhf_dist.models.architecture import Architecture

Command = Literal["sft", "reward", "ppo", "eval"]
AnyConfig = SFTConfig | RewardConfig | PPOConfig | EvalConfig


@dataclass(frozen=True)
class Passes:
    """Sequences that go through a role's model together, over all ranks: what is scored, or one optimizer step."""

    sequences: int
    length: int
    """Longest."""
    targets: int
    """Most positions of a sequence whose log-probs are wanted; 0 for a scalar model."""
    entropy: bool = False
    sequences_per_row: int = 1
    """Sequences that stay together in a micro-batch (a preference pair: 2)."""


@dataclass(frozen=True)
class Role:
    """A role and its work."""

    name: str
    hosting: TrainedModel | FrozenModel | RolloutConfig
    model_path: str
    precision: Precision
    scalar: bool
    score: Passes | None = None
    """Forward passes an iteration."""
    update: tuple[Passes, ...] = ()
    """Forward and backward passes of one optimizer step (PPO and PTX are two)."""
    updates: int = 0
    """Optimizer steps an iteration."""
    average: bool = False
    """Keeps a moving average of its weights."""
    key: str = ""
    """The role's section of the configuration."""
    inline: bool = False
    """Hosted with one rank, in the driver's process."""
    takes_turns: bool = False
    """Moves what it does not need in a phase to host memory (`colocate`)."""

    @property
    def placement(self) -> Placement:
        """What it asks for."""
        return self.hosting

    @property
    def num_ranks(self) -> int:
        """Processes that it has."""
        return 1 if self.inline else self.hosting.num_ranks

    @property
    def trained(self) -> TrainedModel | None:
        """Its settings, if it is trained."""
        return self.hosting if isinstance(self.hosting, TrainedModel) else None

    @property
    def frozen(self) -> FrozenModel | None:
        """Its settings, if it only runs forward."""
        return self.hosting if isinstance(self.hosting, FrozenModel) else None

    @property
    def architecture(self) -> Architecture:
        """Sizes of its model, with what is trained of it. Errors as `architecture`."""
        # With torch: not for those who only ask where roles lie.
        from rlhf_dist.models.architecture import architecture

        if self.trained is None:
            return architecture(self.model_path, self.scalar)
        return architecture(self.model_path, self.scalar, self.trained.freeze, self.trained.lora)

    @property
    def rollout(self) -> RolloutConfig | None:
        """Its settings, if it generates."""
        return self.hosting if isinstance(self.hosting, RolloutConfig) else None

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that share one copy of a rollout role's model."""
        return self.rollout.tensor_parallel_size if self.rollout is not None and not self.inline else 1

    @property
    def num_engines(self) -> int:
        """Engines of a rollout role."""
        return self.num_ranks // self.tensor_parallel_size

    def sequences_per_rank(self, passes: Passes) -> int:
        """The most that a rank gets."""
        rows = -(-passes.sequences // passes.sequences_per_row)
        return -(-rows // self.num_ranks) * passes.sequences_per_row

    def micro_sequences(self, passes: Passes) -> int:
        """Sequences of the largest micro-batch, if all are as long as allowed."""
        host, each = self.hosting, passes.sequences_per_row
        if not isinstance(host, ModelHost):
            raise TypeError(f"{self.name} has no micro-batches")
        rows = host.micro_batch_size
        if host.micro_batch_tokens is not None:
            rows = max(1, host.micro_batch_tokens // (each * passes.length))
        return min(rows * each, self.sequences_per_rank(passes))

    def num_micro_batches(self, passes: Passes) -> int:
        """Forward passes of a rank."""
        return max(1, -(-self.sequences_per_rank(passes) // self.micro_sequences(passes)))

    def idle_ranks(self, passes: Passes) -> int:
        """Ranks that get nothing to do."""
        return max(0, self.num_ranks - -(-passes.sequences // passes.sequences_per_row))


@dataclass(frozen=True)
class Work:
    """A run's roles and numbers."""

    command: Command
    roles: tuple[Role, ...]
    prompt: int
    """Longest prompt in tokens; 0 in supervised runs."""
    response: int
    """Longest response in tokens; 0 in supervised runs."""
    responses: int
    """Generated an iteration; in supervised runs 0."""
    updates: int
    """Optimizer steps an iteration."""

    def role(self, name: str) -> Role | None:
        """The role of that name, if the run has it."""
        return next((role for role in self.roles if role.name == name), None)


def work_of(config: AnyConfig) -> Work:
    """The roles of a run and what they do in an iteration."""
    if isinstance(config, PPOConfig):
        return _ppo(config)
    if isinstance(config, EvalConfig):
        return _eval(config)
    return _supervised(config)


def _supervised(config: SFTConfig | RewardConfig) -> Work:
    pairs = isinstance(config, RewardConfig)
    settings = config.reward if isinstance(config, RewardConfig) else config.sft
    length, each = config.data.max_length_tokens, 2 if pairs else 1
    step = [Passes(settings.batch_size * each, length, 0 if pairs else length - 1, sequences_per_row=each)]
    if isinstance(config, SFTConfig) and config.sft.pretraining_per_step:
        step.append(Passes(config.sft.pretraining_per_step, length, length - 1))
    model, inline = config.model, config.cluster == "inline"
    role = Role(
        "model",
        model,
        model.model_path,
        model.precision,
        pairs,
        update=tuple(step),
        updates=1,
        key="model",
        inline=inline,
    )
    return Work("reward" if pairs else "sft", (role,), 0, 0, 0, 1)


def _ppo(config: PPOConfig) -> Work:
    settings, length, response = config.ppo, config.data.max_length_tokens, config.rollout.max_response_tokens
    inline = config.cluster == "inline"
    policy, value, reference, reward = config.policy, config.value, config.reference, config.reward
    texts = Passes(settings.responses_per_iteration, length, response)
    scalars = Passes(settings.responses_per_iteration, length, 0)
    step = [Passes(settings.mini_batch_size, length, response, entropy=True)]
    if settings.ptx_coef > 0:
        step.append(Passes(settings.ptx_batch_size, length, length - 1))
    updates = settings.updates_per_iteration
    roles = (
        Role(
            "policy",
            policy,
            policy.model_path,
            policy.precision,
            False,
            score=texts,
            update=tuple(step),
            updates=updates,
            average=settings.ema_decay is not None,
            key="policy",
            inline=inline,
        ),
        Role(
            "value",
            value,
            value.model_path,
            value.precision,
            True,
            score=scalars,
            update=(Passes(settings.mini_batch_size, length, 0),),
            updates=updates,
            key="value",
            inline=inline,
        ),
        Role(
            "reference",
            reference,
            reference.model_path,
            reference.precision,
            False,
            texts,
            key="reference",
            inline=inline,
        ),
        Role("reward", reward, reward.model_path, reward.precision, True, scalars, key="reward", inline=inline),
        Role(
            "rollout",
            config.rollout,
            policy.model_path,
            config.rollout.precision or policy.precision,
            False,
            key="rollout",
            inline=inline,
        ),
    )
    roles = tuple(replace(role, takes_turns=role.name in config.colocated_roles) for role in roles)
    return Work("ppo", roles, config.max_prompt_tokens, response, settings.responses_per_iteration, updates)


def _eval(config: EvalConfig) -> Work:
    """The records are not counted without reading them: one micro-batch of each rank stands for all."""
    length, response = config.data.max_length_tokens, config.rollout.max_response_tokens
    inline = config.cluster == "inline"
    prompts = bool(config.data.prompts)
    roles = []
    for name, model in (("policy", config.policy), ("reference", config.reference), ("reward", config.reward)):
        needed = {"policy": bool(config.data.instructions), "reference": prompts, "reward": True}[name]
        if model is not None and needed:
            sequences = model.num_ranks * model.micro_batch_size
            targets = {"policy": length - 1, "reference": response, "reward": 0}[name]
            passes = Passes(sequences, length, targets)
            scalar = name == "reward"
            roles.append(Role(name, model, model.model_path, model.precision, scalar, passes, key=name, inline=inline))
    responses = 0
    if config.policy is not None and prompts:
        responses = config.rollout.num_engines * config.rollout.batch_size
        precision = config.rollout.precision or config.policy.precision
        roles.append(
            Role("rollout", config.rollout, config.policy.model_path, precision, False, key="rollout", inline=inline)
        )
    return Work("eval", tuple(roles), length - response, response if responses else 0, responses, 0)
