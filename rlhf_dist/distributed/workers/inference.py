"""Forward passes over a rank's rows, micro-batch by micro-batch: for trained and frozen models alike.

`engine` is anything with `device` and `infer`. An idle micro-batch still runs, on the smallest batch there is, so that the
ranks' collectives stay aligned under ZeRO-3; its output is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_dist.core.batches import Experience, RolloutBatch, SequenceBatch, TokenBatch, length_mask
from rlhf_dist.models.forward import last_token_scores, response_target_mask, scatter_responses, state_values

IDLE_TOKENS = TokenBatch(
    tokens=torch.zeros(1, 2, dtype=torch.long), lengths=torch.tensor([2]), loss_mask=torch.tensor([[False, True]])
)
IDLE_SEQUENCE = SequenceBatch(IDLE_TOKENS.tokens, IDLE_TOKENS.lengths)
IDLE_EXPERIENCE = Experience(
    tokens=IDLE_TOKENS.tokens,
    prompt_lengths=torch.ones(1, dtype=torch.long),
    response_lengths=torch.ones(1, dtype=torch.long),
    **{name: torch.zeros(1, 1) for name in ("old_logprobs", "old_values", "advantages", "returns", "ref_logprobs")},
)
"""What an idle micro-batch runs on: the smallest batch with one target."""

MicroBatches = list[list[int]]


def pick(batch: Any, micro_batches: MicroBatches) -> list[Any]:
    """Micro-batches of rows; None for an idle one."""
    return [batch.rows(rows) if rows else None for rows in micro_batches]


def response_logprobs(engine: Any, rollout: RolloutBatch, micro_batches: MicroBatches, temperature: float) -> Tensor:
    """[rows, R] log-probs of response tokens under `engine`'s model; idle micro-batches run and are dropped."""
    outputs = []
    for micro in pick(rollout, micro_batches):
        batch = (micro or IDLE_EXPERIENCE).to(engine.device)
        targets = response_target_mask(batch.prompt_lengths, batch.response_lengths, batch.tokens.shape[1])
        logprobs, _ = engine.infer(batch.tokens, batch.lengths, targets, temperature)
        outputs.append(scatter_responses(logprobs, batch.response_mask) if micro is not None else None)
    return flat_rows(outputs, micro_batches, len(rollout))


def evaluate_nll(engine: Any, micro_batches: list[TokenBatch | None]) -> dict[str, float]:
    """Sums of negative log-likelihood (nats) and of targets. Idle micro-batches run, and count nothing."""
    sums = {"nll": 0.0, "num_targets": 0.0}
    for micro in micro_batches:
        batch = (micro or IDLE_TOKENS).to(engine.device)
        logprobs, _ = engine.infer(batch.tokens, batch.lengths, batch.loss_mask)
        if micro is not None:
            sums["nll"] -= float(logprobs.double().sum())
            sums["num_targets"] += micro.num_targets
    return sums


def sequence_scores(engine: Any, batch: SequenceBatch, micro_batches: MicroBatches) -> Tensor:
    """[rows] fp32: the scalar at each sequence's last token; idle micro-batches run and are dropped."""
    outputs = []
    for micro in pick(batch, micro_batches):
        rows = (micro or IDLE_SEQUENCE).to(engine.device)
        scores = last_token_scores(engine.infer(rows.tokens, rows.lengths), rows.lengths)
        outputs.append(scores[:, None] if micro is not None else None)
    return flat_rows(outputs, micro_batches, len(batch)).reshape(-1)


def response_values(engine: Any, rollout: RolloutBatch, micro_batches: MicroBatches) -> Tensor:
    """[rows, R + 1] fp32 value of the state before each response token and after the last, 0 on padding."""
    outputs = []
    for micro in pick(rollout, micro_batches):
        batch = (micro or IDLE_EXPERIENCE).to(engine.device)
        scalars = engine.infer(batch.tokens, batch.lengths)
        states = length_mask(batch.response_lengths + 1, batch.response_mask.shape[1] + 1)
        values = state_values(scalars, batch.prompt_lengths, states)
        outputs.append(values if micro is not None else None)
    return flat_rows(outputs, micro_batches, len(rollout))


def flat_rows(outputs: list[Tensor | None], micro_batches: MicroBatches, num_rows: int) -> Tensor:
    """Outputs of micro-batches ([n_i, R_i]) put back into the order of the rank's rows: [num_rows, max R]."""
    width = max((o.shape[1] for o in outputs if o is not None), default=0)
    result = torch.zeros(num_rows, width)
    for output, rows in zip(outputs, micro_batches, strict=True):
        if output is not None:
            result[torch.tensor(rows), : output.shape[1]] = output.float().cpu()
    return result
