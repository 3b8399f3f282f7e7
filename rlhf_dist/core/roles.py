"""What a trainer knows of the models: narrow protocols that hide where the work runs.

Every call returns a `concurrent.futures.Future`, so roles work at the same time and the trainer waits for
results where it needs them. Implementations split a batch over their ranks and put the rows back in order;
a result never depends on the split (beyond floating-point reassociation).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rlhf_dist.core.batches import Experience, PreferenceBatch, PromptBatch, RolloutBatch, SequenceBatch, TokenBatch
from rlhf_dist.core.steps import UpdateReport


class Checkpointed(Protocol):
    """Whatever a checkpoint keeps beside the driver's own numbers."""

    def save_checkpoint(self, path: Path) -> Future[None]:
        """Write the state under `path`, a new folder; of a model, parameters, optimizer and schedule (every rank its shard)."""
        ...

    def load_checkpoint(self, path: Path) -> Future[None]:
        """Restore what `save_checkpoint` wrote, bit for bit."""
        ...


class Trained(Checkpointed, Protocol):
    """A model with optimizer state."""

    def save(self, folder: Path) -> Future[None]:
        """Write what a run leaves of the model: `folder`/model in Hugging Face format (safetensors, config, tokenizer; adapters
        merged), and beside it what the model has more, such as adapter/."""
        ...


class LanguageModel(Trained, Protocol):
    """A language model under supervised training."""

    def update(
        self, batch: TokenBatch, step: int, text: TokenBatch | None = None, text_coef: float = 0.0
    ) -> Future[UpdateReport]:
        """Optimizer step number `step` (0-based): on the mean negative log-likelihood of the batch's targets, plus `text_coef`
        times that of the targets of `text`."""
        ...

    def evaluate(self, batch: TokenBatch) -> Future[dict[str, float]]:
        """Sums over the batch: `nll` (nats) and `num_targets`."""
        ...


class PreferenceModel(Trained, Protocol):
    """A reward model under training."""

    def update(self, batch: PreferenceBatch, step: int) -> Future[UpdateReport]:
        """Optimizer step number `step` (0-based): on the mean over prompts of the mean loss of a prompt's pairs."""
        ...

    def score_pairs(self, batch: PreferenceBatch) -> Future[Tensor]:
        """[P, K] fp32 scores; 0 where there is no response."""
        ...


class Policy(Trained, Protocol):
    """π_RL, trained by PPO."""

    def logprobs(self, rollout: RolloutBatch) -> Future[Tensor]:
        """[B, R] fp32 log-probs of the response tokens; 0 on padding."""
        ...

    def update(
        self,
        experience: Experience,
        steps: Sequence[Tensor],
        ptx: Sequence[TokenBatch] | None,
        kl_loss_coef: float = 0.0,
        measure_terms: bool = False,
    ) -> Future[UpdateReport]:
        """One optimizer step for each entry of `steps` (row indices into `experience`), with `ptx[i]` mixed into step i and
        `kl_loss_coef` times the KL to the reference; fewer where the policy has moved too far. `measure_terms`: report the
        gradient norm of PTX against that of PPO in the first step."""
        ...


class ValueFunction(Trained, Protocol):
    """V, the critic."""

    def values(self, rollout: RolloutBatch) -> Future[Tensor]:
        """[B, R + 1] fp32 value of the state before each response token and after the last; 0 on padding."""
        ...

    def update(self, experience: Experience, steps: Sequence[Tensor]) -> Future[UpdateReport]:
        """One optimizer step for each entry of `steps`."""
        ...


class Reference(Protocol):
    """Frozen π_SFT."""

    def logprobs(self, rollout: RolloutBatch) -> Future[Tensor]:
        """[B, R] fp32 log-probs of the response tokens; 0 on padding."""
        ...


class LanguageModelScorer(Protocol):
    """A frozen language model, for evaluation."""

    def evaluate(self, batch: TokenBatch) -> Future[dict[str, float]]:
        """Sums over the batch: `nll` (nats) and `num_targets`."""
        ...


class RewardScorer(Protocol):
    """Frozen r_θ."""

    def score(self, sequences: SequenceBatch) -> Future[Tensor]:
        """[B] fp32, the scalar head at each sequence's last token."""
        ...


class RolloutEngine(Protocol):
    """Generates responses with the policy's weights."""

    def generate(self, prompts: PromptBatch, *, stream: str, iteration: int) -> Future[RolloutBatch]:
        """Sample one response a prompt. The tokens are a function of the weights and of
        (seed, `stream`, `iteration`, sample id, position)."""
        ...

    def probe(self, prompts: PromptBatch) -> Future[RolloutBatch]:
        """A few tokens after each prompt, by every engine, drawn from the whole distribution: nothing is cut off. For comparing
        log-probs with the policy's."""
        ...


class WeightSync(Protocol):
    """Brings the policy's weights to the rollout engines."""

    def push(self, version: int) -> Future[None]:
        """Copy the weights and label them `version`; fails unless every engine reports version and checksum."""
        ...
