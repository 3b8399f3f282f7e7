"""Training as the papers write it: one process, one padded forward pass a step, torch and transformers alone.

What `rlhf_dist` is compared with. Nothing of its engine, workers, losses or masks is used here: positions are slices,
sums are Python sums, learning rates are written out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Optimizer:
    """AdamW with its learning rates written out."""

    learning_rates: tuple[float, ...]
    """One a step."""
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    """Of matrices; norms' weights and other vectors have none."""
    max_grad_norm: float


class Trace:
    """What a loop saw: name → a number each step."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def see(self, name: str, value: Tensor) -> None:
        """Keep one number."""
        self.seen.setdefault(name, []).append(value.detach().item())

    def means(self) -> dict[str, float]:
        """Of each name, over the steps."""
        return {name: sum(values) / len(values) for name, values in self.seen.items()}


def descend(
    model: Any, optimizer: Optimizer, loss_of_step: Callable[[int, Trace], Tensor], after_step: Callable[[], None]
) -> Trace:
    """A step of AdamW on `loss_of_step(i, trace)` for each learning rate."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.0,
        betas=optimizer.betas,
        eps=optimizer.eps,
    )
    trace = Trace()
    for i, learning_rate in enumerate(optimizer.learning_rates):
        for group in adam.param_groups:
            group["lr"] = learning_rate
        adam.zero_grad()
        loss_of_step(i, trace).backward()
        trace.see("grad_norm", torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.max_grad_norm))
        adam.step()
        after_step()
    return trace


def moving_average(start: dict[str, Tensor], steps: Sequence[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """What θ̄ ← d θ̄ + (1 − d) θ comes to: after n steps dⁿ θ₀ + (1 − d) Σ_i dⁿ⁻ⁱ θ_i, in float64 (Polyak and Juditsky 1992)."""
    n = len(steps)
    average = {name: decay**n * t.double() for name, t in start.items()}
    for i, weights in enumerate(steps, start=1):
        for name, t in weights.items():
            average[name] += (1 - decay) * decay ** (n - i) * t.double()
    return average


def padding_mask(lengths: Tensor, width: int) -> Tensor:
    """[B, width] int64, 1 on tokens."""
    return torch.tensor([[1] * n + [0] * (width - n) for n in lengths.tolist()])


def log_softmax_at(model: Any, tokens: Tensor, lengths: Tensor, temperature: float) -> Tensor:
    """[B, T, V] log-probs; position t is about token t + 1."""
    logits = model(input_ids=tokens, attention_mask=padding_mask(lengths, tokens.shape[1])).logits
    return torch.log_softmax(logits / temperature, dim=-1)


def scalars_at(model: Any, tokens: Tensor, lengths: Tensor) -> Tensor:
    """[B, T] the scalar head at each position."""
    hidden = model.model(input_ids=tokens, attention_mask=padding_mask(lengths, tokens.shape[1])).last_hidden_state
    return model.score(hidden)[:, :, 0]


def mean(terms: Sequence[Tensor]) -> Tensor:
    """Of scalars or vectors, over all their elements."""
    return sum(t.sum() for t in terms) / sum(t.numel() for t in terms)  # pyright: ignore[reportReturnType]


# -- objectives, as means over a whole step ----------------------------------------------------------------------------


def nll(model: Any, batch: Any) -> Tensor:
    """−log p of the targets of a `TokenBatch`."""
    log_p = log_softmax_at(model, batch.tokens, batch.lengths, temperature=1.0)
    terms = []
    for b, n in enumerate(batch.lengths.tolist()):
        for t in range(1, n):
            if batch.loss_mask[b, t]:
                terms.append(-log_p[b, t - 1, batch.tokens[b, t]])
    return mean(terms)


def ranking(model: Any, batch: Any, margin_coef: float, centering_coef: float) -> Tensor:
    """Of a `PreferenceBatch`, the mean over prompts of the mean over their pairs of −log σ(r_i − r_j − m_ij) + λ (r_i + r_j)²
    (InstructGPT, eq. 1; Llama 2, eq. 2; Eisenstein et al. 2023). Ties make no pair."""
    prompts = []
    for tokens, lengths, ranks, ratings in zip(batch.tokens, batch.lengths, batch.ranks, batch.ratings, strict=True):
        num = int((lengths > 0).sum())
        scalars = scalars_at(model, tokens[:num], lengths[:num])
        scores = [scalars[k, lengths[k] - 1] for k in range(num)]
        pairs = []
        for i, j in itertools.combinations(range(num), 2):
            if ranks[i] < ranks[j]:
                margin = scores[i] - scores[j] - margin_coef * (ratings[i] - ratings[j])
                pairs.append(torch.log1p(torch.exp(-margin)) + centering_coef * (scores[i] + scores[j]) ** 2)
        prompts.append(mean(pairs))
    return mean(prompts)


def responses(batch: Any) -> list[tuple[Tensor, int, int]]:
    """(tokens, prompt length, response length) of each row of an `Experience` or `RolloutBatch`."""
    return list(zip(batch.tokens, batch.prompt_lengths.tolist(), batch.response_lengths.tolist(), strict=True))


def response_logprobs(model: Any, batch: Any, temperature: float) -> tuple[list[Tensor], list[Tensor]]:
    """Per row: [m] log π of each response token, and [m] entropies of the distributions they were taken from."""
    log_p = log_softmax_at(model, batch.tokens, batch.prompt_lengths + batch.response_lengths, temperature)
    logprobs, entropies = [], []
    for b, (tokens, n, m) in enumerate(responses(batch)):
        rows = log_p[b, n - 1 : n + m - 1]
        logprobs.append(torch.stack([rows[t, tokens[n + t]] for t in range(m)]))
        entropies.append(-(rows.exp() * rows).sum(-1))
    return logprobs, entropies


def response_values(model: Any, batch: Any) -> list[Tensor]:
    """Per row: [m + 1] value of the state before each response token and after the last."""
    scalars = scalars_at(model, batch.tokens, batch.prompt_lengths + batch.response_lengths)
    return [scalars[b, n - 1 : n + m] for b, (_, n, m) in enumerate(responses(batch))]


@dataclass(frozen=True)
class PolicyTerms:
    """Coefficients of the policy's objective."""

    temperature: float
    clip_low: float
    clip_high: float
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    """Of the KL to the reference as a term of the loss."""


def policy_objective(model: Any, experience: Any, terms: PolicyTerms, trace: Trace) -> Tensor:
    """−w min(ρA, clip(ρ, 1 − ε, 1 + ε')A), no more than w c|A| for A < 0; the entropy bonus; the KL to the reference. The
    importance weights w are 1 where the experience has none, and divide nothing: the mean is over all tokens.

    Schulman et al. 2017, eq. 7 and 9; Ye et al. 2020, eq. 5; Schulman 2020 (k3).
    """
    losses, held, bounded, kl, moved = [], [], [], [], []
    weights = experience.importance_weights
    logprobs, entropies = response_logprobs(model, experience, terms.temperature)
    for b, row in enumerate(logprobs):
        for t, new in enumerate(row):
            ratio = torch.exp(new - experience.old_logprobs[b, t])
            advantage = experience.advantages[b, t]
            objective = torch.min(ratio * advantage, ratio.clamp(1 - terms.clip_low, 1 + terms.clip_high) * advantage)
            if terms.dual_clip is not None and advantage < 0:
                bounded.append(objective < terms.dual_clip * advantage)
                objective = torch.max(objective, terms.dual_clip * advantage)
            losses.append(-objective if weights is None else -weights[b, t] * objective)
            moved.append(ratio - 1 - torch.log(ratio))
            # The clip holds a token where continuing would have raised the objective.
            held.append((ratio > 1 + terms.clip_high) if advantage > 0 else (ratio < 1 - terms.clip_low))
            other = torch.exp(experience.ref_logprobs[b, t] - new)
            kl.append(other - 1 - torch.log(other))
    trace.see("clip_fraction", mean([h.float() for h in held]))
    trace.see("num_bounded", sum(bounded, torch.tensor(0)))
    trace.see("loss", mean(losses))
    trace.see("entropy", mean(entropies))
    trace.see("approx_kl", mean(moved))
    if terms.kl_coef:
        trace.see("kl_loss", mean(kl))
    return mean(losses) - terms.entropy_coef * mean(entropies) + terms.kl_coef * mean(kl)


def value_error(model: Any, experience: Any, clip: float, trace: Trace) -> Tensor:
    """½ max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²)."""
    terms, outside = [], []
    for b, states in enumerate(response_values(model, experience)):
        m = len(states) - 1
        new = states[:m]
        old, target = experience.old_values[b, :m], experience.returns[b, :m]
        clipped = old + (new - old).clamp(-clip, clip)
        terms.append(0.5 * torch.max((new - target) ** 2, (clipped - target) ** 2))
        outside.append(((new - old).abs() > clip).float())
    trace.see("outside_range", mean(outside))
    return mean(terms)


# -- from scores to experience -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shaping:
    """Coefficients of the path from scores to advantages."""

    kl_coef: float
    gamma: float
    gae_lambda: float
    score_clip: float
    missing_eos_penalty: float


def generalized_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t (Schulman et al. 2016, eq. 16); `values` has one more entry."""
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def advantages_and_returns(
    settings: Shaping,
    truncated: list[bool],
    scores: list[float],
    logprobs: list[Tensor],
    ref_logprobs: list[Tensor],
    values: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Per row: whitened advantages and returns. A cut-off response continues: its last token's return has the value of the
    state after it. Mean and variance are over all tokens of all rows."""
    advantages, returns = [], []
    for b, score in enumerate(scores):
        rewards = [-settings.kl_coef * k for k in (logprobs[b] - ref_logprobs[b]).tolist()]
        shaped = max(-settings.score_clip, min(settings.score_clip, score))
        rewards[-1] += shaped - (settings.missing_eos_penalty if truncated[b] else 0.0)
        before, end = values[b].tolist()[:-1], values[b].tolist()[-1]
        states = [*before, end if truncated[b] else 0.0]
        row = generalized_advantages(rewards, states, settings.gamma, settings.gae_lambda)
        advantages.append(row)
        returns.append(torch.tensor([a + v for a, v in zip(row, before, strict=True)]))
    flat = [a for row in advantages for a in row]
    center = sum(flat) / len(flat)
    spread = (sum((a - center) ** 2 for a in flat) / len(flat)) ** 0.5
    return [torch.tensor([(a - center) / spread for a in row]) for row in advantages], returns
