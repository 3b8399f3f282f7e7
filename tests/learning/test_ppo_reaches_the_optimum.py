"""PPO reaches the optimum of the KL-regularized objective, which is known in closed form.

Maximizing E_π[r(x, y)] − β·KL(π ‖ π_ref) over all distributions gives (Ziebart 2010; Rafailov et al. 2023, eq. 4)

    π*(y|x) = π_ref(y|x)·exp(r(x, y)/β) / Z(x)

The "bandit": responses so short that π* can be computed for every one of them; two prompts with different rewards, so that the
policy must condition on x. Everything but the reward is the product's: trainer, policy, reference, value function, rollouts,
weight sync. A KL with the wrong sign, factor or position, a score on the wrong token, a reward that is scaled or shifted
differently for different tokens, or a biased advantage would move the fixed point away from π*.

With the KL in the rewards, responses have up to two tokens (one, if the first is EOS): the first token's optimum depends on
what it lets the second gain. As a term of the loss, the KL is that of each token at the states visited, whose optimum is π* for
responses of one token.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import hosted, save_tiny_lm, trained
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.config.hosting import CheckpointConfig, FrozenModel, RunConfig
from rlhf_dist.core.batches import SequenceBatch
from rlhf_dist.core.futures import completed
from rlhf_dist.data.bad_rows import DataReport
from rlhf_dist.data.datasets import PromptDataset, Ragged
from rlhf_dist.distributed.role_groups import ReferenceRole
from rlhf_dist.distributed.rollout_engines import GroupWeightSync, RolloutRole
from rlhf_dist.distributed.workers.reference import ReferenceWorker
from rlhf_dist.distributed.workers.rollout import RolloutWorker
from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.ppo.importance import UNCORRECTED, Correction
from rlhf_dist.ppo.policy_worker import PolicyWorker
from rlhf_dist.ppo.roles import PolicyRole, ValueRole
from rlhf_dist.ppo.scoring import Precisions
from rlhf_dist.ppo.trainer import PPOData, PPORoles, PPOTrainer
from rlhf_dist.ppo.value_worker import ValueWorker
from rlhf_dist.rollout.config import RolloutConfig
from rlhf_dist.run.checkpoint import Checkpoints
from rlhf_dist.run.run import Run
from rlhf_dist.run.run_folder import RunFolder

PROMPTS = [[5, 9, 3], [7, 7, 2, 11]]
BETA, TEMPERATURE, BATCH = 0.5, 0.8, 512
TOLERANCE = {"reward": (0.12, 0.04), "loss": (0.04, 0.04)}
"""Where the KL stands → largest total variation distance to π* of whole responses (in the first case one of 80,000) and of
their first tokens. The untrained policy is at more than 0.4; that of another β is farther away than the right one."""


def first_reward(prompt: int, tokens: Tensor) -> Tensor:
    """What the first token brings: a wave over the token ids, in opposite phase for the two prompts."""
    return (tokens * 0.7 + prompt * torch.pi).sin()


def second_reward(tokens: Tensor) -> Tensor:
    """What the second token brings."""
    return (tokens * 1.3).cos()


class KnownReward:
    """In place of the reward model: a function that is known exactly."""

    def score(self, sequences: SequenceBatch) -> Future[Tensor]:
        scores = []
        for tokens, n in zip(sequences.tokens, sequences.lengths.tolist(), strict=True):
            (prompt,) = (i for i, p in enumerate(PROMPTS) if tokens[: len(p)].tolist() == p)
            response = tokens[len(PROMPTS[prompt]) : n]
            scores.append(first_reward(prompt, response[0]) + second_reward(response[1:]).sum())
        return completed(torch.stack(scores))


def distributions(model: Any, eos: int, num_tokens: int) -> Tensor:
    """[2, V, V] float64 of π(y|x): entry (i, j) is of response i, j; one that ends with EOS after a token stands at (eos, 0).

    With one token a response, entry (i, 0) is of i.
    """
    joint = []
    with torch.no_grad():
        for prompt in PROMPTS:
            first = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / TEMPERATURE, -1)
            second = torch.zeros(len(first), len(first), dtype=torch.float64)
            second[:, 0] = 1
            if num_tokens == 2:
                after = torch.tensor([[*prompt, token] for token in range(len(first))])
                second = torch.softmax(model(after).logits[:, -1].double() / TEMPERATURE, -1)
                second[eos] = torch.eye(len(first))[0]
            joint.append(first[:, None] * second)
    return torch.stack(joint)


def optimum(ref: Tensor, eos: int, num_tokens: int, beta: float) -> Tensor:
    """[2, V, V] float64: π*."""
    tokens = torch.arange(ref.shape[1])
    rewards = torch.stack([first_reward(prompt, tokens) for prompt in range(2)])[:, :, None].double().expand_as(ref)
    if num_tokens == 2:
        more = second_reward(tokens).double()[None, None].repeat(1, len(tokens), 1)
        more[:, eos] = 0
        rewards = rewards + more
    best = ref * (rewards / beta).exp()
    return best / best.sum((1, 2), keepdim=True)


def total_variation(p: Tensor, q: Tensor) -> float:
    """The larger of the two prompts' ½ Σ |p − q|."""
    return float((p - q).abs().sum((1, 2)).max() / 2)


@contextlib.contextmanager
def trainer(
    tiny_lm: Path, tiny_rm: Path, run_dir: Path, ppo: PPOSettings, rollout_settings: dict[str, Any]
) -> Iterator[PPOTrainer]:
    """A trainer with real roles in this process."""
    optimizer = {"learning_rate": 4e-3, "schedule": "cosine", "warmup_fraction": 0.05, "weight_decay": 0.0}
    common: dict[str, Any] = {"num_steps": ppo.num_updates}
    folder = RunFolder.open(run_dir, resume=False, overwrite=False)
    at_temperature = {"temperature": TEMPERATURE}
    rollout_config = RolloutConfig(temperature=TEMPERATURE, batch_size=BATCH, **rollout_settings)
    corrected = rollout_config.engine == "vllm" or ppo.off_policy_iterations > 0
    frozen = FrozenModel(model_path=str(tiny_lm), precision="fp32")
    policy_config, value_config = (trained(path, optimizer=optimizer) for path in (tiny_lm, tiny_rm))
    with (
        hosted(PolicyWorker, config=policy_config, settings=ppo, **common, **at_temperature) as policy,
        hosted(ValueWorker, config=value_config, clip_range=None, **common) as value,
        hosted(ReferenceWorker, config=frozen, **at_temperature) as reference,
        hosted(RolloutWorker, config=rollout_config, model_path=str(tiny_lm), precision="fp32") as rollout,
        Run.open(RunConfig(run_dir=run_dir), folder, None) as run,
    ):
        rollouts = RolloutRole(rollout, BATCH)
        roles = PPORoles(
            policy=PolicyRole(policy, BATCH),
            reference=ReferenceRole(reference, BATCH),
            reward=KnownReward(),
            value=ValueRole(value, BATCH),
            rollout=rollouts,
            weight_sync=GroupWeightSync(policy, rollouts.engines),
        )
        yield PPOTrainer(
            run,
            roles,
            PPOData(PromptDataset(Ragged(PROMPTS), ["a", "b"], DataReport()), None, None, decode=str),
            ppo,
            Checkpoints(folder.checkpoints_dir, CheckpointConfig(at_end=False)),
            max_response_tokens=rollout_config.max_response_tokens,
            precisions=Precisions(rollout="fp32", same_start="fp32"),
            correction=Correction(cap=2.0) if corrected else UNCORRECTED,
        )


IN_REWARD, IN_LOSS = {"kl_in": "reward", "kl_estimator": "k1"}, {"kl_in": "loss", "kl_estimator": "k2"}


@pytest.mark.parametrize(
    ("num_tokens", "settings", "rollout"),
    [
        pytest.param(2, IN_REWARD, {}, id="kl-in-reward"),
        pytest.param(1, IN_LOSS, {}, id="kl-in-loss"),
        pytest.param(2, IN_REWARD | {"off_policy_iterations": 1}, {}, id="one-step-off-policy"),
        pytest.param(2, IN_REWARD, {"engine": "vllm"}, id="vllm"),
    ],
)
def test_ppo_reaches_the_closed_form_optimum(
    tiny_rm: Path, tmp_path: Path, num_tokens: int, settings: dict[str, Any], rollout: dict[str, Any]
):
    if rollout and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    tiny_lm = save_tiny_lm(tmp_path / "lm", **({"num_attention_heads": 2} if rollout else {}))
    ppo = PPOSettings(
        num_iterations=250,
        prompts_per_iteration=BATCH,
        mini_batch_size=BATCH // 2,
        num_epochs=1,
        kl_coef=BETA,
        gae_lambda=1.0,
        # Whitening divides by the advantages' spread, which goes to 0 at π*: it would blow up noise there.
        whiten_advantages=False,
        value_clip_range=None,
        # The noise of sampling, which near π* is all that moves the policy, averages out.
        ema_decay=0.97,
        **settings,
    )
    eos = AutoTokenizer.from_pretrained(tiny_lm).eos_token_id
    ref = distributions(AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32), eos, num_tokens)
    with trainer(
        tiny_lm, tiny_rm, tmp_path / "run", ppo, {"max_response_tokens": num_tokens, **rollout}
    ) as ppo_trainer:
        ppo_trainer.run(resume=False)
        ppo_trainer.run_log.save(ppo_trainer.roles.policy)
    average = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model_ema", dtype=torch.float32)
    found = distributions(average, eos, num_tokens)

    best = optimum(ref, eos, num_tokens, BETA)
    start, end = total_variation(ref, best), total_variation(found, best)
    first = total_variation(found.sum(2, keepdim=True), best.sum(2, keepdim=True))
    others = {beta: total_variation(found, optimum(ref, eos, num_tokens, beta)) for beta in (0.8 * BETA, 1.2 * BETA)}
    print(
        f"KL in the {ppo.kl_in}, responses of {num_tokens} token(s): total variation distance to the optimum {end:.4f} "
        f"(untrained {start:.4f}), of the first token {first:.4f} (tolerances {TOLERANCE[ppo.kl_in]}); to the optima of "
        + "other β: "
        + ", ".join(f"{beta:.1f}: {distance:.4f}" for beta, distance in others.items())
    )
    assert start > 0.4
    assert end < TOLERANCE[ppo.kl_in][0]
    assert first < TOLERANCE[ppo.kl_in][1]
    assert end < min(others.values())
