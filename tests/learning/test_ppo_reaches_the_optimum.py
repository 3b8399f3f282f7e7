"""PPO reaches the optimum of the KL-regularised objective, which is known in closed form.

Maximising E_π[r(y)] − β·KL(π ‖ π_ref) over all distributions gives (Ziebart 2010; Rafailov et al. 2023, eq. 4)

    π*(y|x) = π_ref(y|x)·exp(r(x, y)/β) / Z(x)

The "bandit": responses of one token, so that π* can be computed for every one of them; two prompts with different rewards,
so that the policy must condition on x. Everything but the reward is the product's: trainer, policy, reference, value
function, rollouts, weight sync. A KL with the wrong sign, factor or position, a reward that is scaled or shifted
differently for different tokens, or a biased advantage would move the fixed point away from π*.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import hosted, trained
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_dist.batches import SequenceBatch
from rlhf_dist.cluster.futures import completed
from rlhf_dist.cluster.proxies import GroupWeightSync, PolicyRole, ReferenceRole, RolloutRole, ValueRole
from rlhf_dist.config import FrozenModel, PPOSettings, RolloutConfig, RunConfig
from rlhf_dist.data.datasets import PromptDataset
from rlhf_dist.data.store import DataReport
from rlhf_dist.tracking.run_folder import RunFolder
from rlhf_dist.trainers.checkpoint import Checkpoints
from rlhf_dist.trainers.ppo import PPOData, PPORoles, PPOTrainer, Precisions
from rlhf_dist.trainers.run import Run

PROMPTS = [[5, 9, 3], [7, 7, 2, 11]]
BETA, TEMPERATURE, BATCH = 0.5, 0.8, 512
TOLERANCE = {"reward": 0.02, "loss": 0.07}
"""Where the KL stands → largest total variation distance to π*; the untrained policy is at more than 0.4. With the KL in the
rewards an advantage at π* is 0 for every token, and the noise of sampling goes away; as a term of the loss, KL and advantage
cancel in the mean over samples only."""


def reward(prompt_lengths: Tensor, tokens: Tensor) -> Tensor:
    """r(x, y): a wave over the token ids, in opposite phase for the two prompts."""
    phase = torch.where(prompt_lengths == 3, 0.0, torch.pi)
    return (tokens * 0.7 + phase).sin()


class KnownReward:
    """In place of the reward model: a function that is known exactly."""

    def score(self, sequences: SequenceBatch) -> Future[Tensor]:
        last = sequences.tokens.gather(1, sequences.lengths[:, None] - 1).squeeze(1)
        return completed(reward(sequences.lengths - 1, last))


def distributions(model: Any) -> Tensor:
    """[2, V] float64: π(y|x) of the first response token at the sampling temperature."""
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    return torch.softmax(torch.stack(logits).double() / TEMPERATURE, -1)


@pytest.mark.parametrize(
    "settings",
    [{"kl_in": "reward", "kl_estimator": "k1"}, {"kl_in": "loss", "kl_estimator": "k2"}],
    ids=["kl-in-reward", "kl-in-loss"],
)
def test_ppo_reaches_the_closed_form_optimum(tiny_lm: Path, tiny_rm: Path, tmp_path: Path, settings: dict):
    ref = distributions(AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32))
    tokens = torch.arange(ref.shape[1])
    rewards = torch.stack([reward(torch.tensor(len(prompt)), tokens) for prompt in PROMPTS]).double()
    best = torch.softmax(ref.log() + rewards / BETA, -1)

    ppo = PPOSettings(
        num_iterations=100,
        prompts_per_iteration=BATCH,
        mini_batch_size=BATCH // 2,
        num_epochs=1,
        kl_coef=BETA,
        gae_lambda=1.0,
        # Whitening divides by the advantages' spread, which goes to 0 at π*: it would blow up noise there.
        whiten_advantages=False,
        value_clip_range=None,
        **settings,
    )
    optimizer = {"learning_rate": 4e-3, "schedule": "cosine", "warmup_fraction": 0.05, "weight_decay": 0.0}
    steps = ppo.num_updates
    folder = RunFolder.open(tmp_path / "run", resume=False, overwrite=False)
    config = trained(tiny_lm, optimizer=optimizer)
    value_config = trained(tiny_rm, optimizer=optimizer)
    with (
        hosted("policy:PolicyWorker", config=config, num_steps=steps, temperature=TEMPERATURE, settings=ppo) as policy,
        hosted("value:ValueWorker", config=value_config, num_steps=steps, clip_range=None) as value,
        hosted(
            "reference:ReferenceWorker",
            config=FrozenModel(model_path=str(tiny_lm), precision="fp32"),
            temperature=TEMPERATURE,
        ) as reference,
        hosted(
            "rollout:RolloutWorker",
            config=RolloutConfig(max_response_tokens=1, temperature=TEMPERATURE),
            model_path=str(tiny_lm),
            precision="fp32",
        ) as rollout,
        Run.open(RunConfig(run_dir=tmp_path / "run"), folder, None) as run,
    ):
        roles = PPORoles(
            policy=PolicyRole(policy, BATCH),
            reference=ReferenceRole(reference, BATCH),
            reward=KnownReward(),
            value=ValueRole(value, BATCH),
            rollout=RolloutRole(rollout, BATCH),
            weight_sync=GroupWeightSync(policy, rollout),
        )
        prompts = PromptDataset(PROMPTS, ["a", "b"], DataReport())
        trainer = PPOTrainer(
            run,
            roles,
            PPOData(prompts, None, None, decode=str),
            ppo,
            Checkpoints(folder.checkpoints_dir, keep_last=1),
            every_iterations=0,
            max_response_tokens=1,
            precisions=Precisions(rollout="fp32", same_start="fp32"),
        )
        trainer.run(resume=False)
        found = distributions(policy.worker.model)  # pyright: ignore[reportAttributeAccessIssue]

    def distances(other: Tensor) -> tuple[float, float]:
        total_variation = (other - best).abs().sum(-1).max() / 2
        kl = (other * (other.log() - best.log())).sum(-1).max()
        return float(total_variation), float(kl)

    (start, start_kl), (end, end_kl) = distances(ref), distances(found)
    tolerance = TOLERANCE[settings["kl_in"]]
    print(
        f"KL in the {settings['kl_in']}: total variation distance to the optimum {end:.4f} (untrained {start:.4f}, tolerance "
        f"{tolerance}); KL to it {end_kl:.5f} nats (untrained {start_kl:.3f})"
    )
    assert start > 0.4
    assert end < tolerance
