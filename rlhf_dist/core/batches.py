"""Typed records that cross module borders.

Axes: B sequences, T token positions of the longest sequence (prompt then response, padded on the right),
R response positions of the longest response, P prompts with ranked responses, K
responses of the prompt that has most. All tensors live on the CPU here; workers
move what they need to their device.

Response-aligned tensors ([B, R]) hold at position t what belongs to the t-th response token: its log-prob,
its reward, or the value of the state *before* it was taken. Nothing is ever shifted by hand outside
`models/`, where the logits are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

FINISHED, TRUNCATED = 0, 1
"""Finish reasons: the response ends in EOS, or was cut off at the length limit."""


def pad_rows(
    rows: Sequence[Sequence[float]] | Sequence[Tensor], value: float = 0, dtype: torch.dtype = torch.long
) -> Tensor:
    """Stack rows of different lengths into one [B, max length] tensor, padded on the right with `value`."""
    width = max((len(row) for row in rows), default=0)
    out = torch.full((len(rows), width), value, dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=dtype)
    return out


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """[B] lengths → [B, width] bool, True on the first `lengths[b]` positions of row b."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


@dataclass(frozen=True)
class _Rows:
    """Row selection for dataclasses whose tensors all have the batch axis first."""

    _widths: ClassVar[dict[str, str]] = {}
    """Field → the length field whose maximum is the width that its last axis can be trimmed to."""

    def rows(self, index: Sequence[int] | Tensor) -> Self:
        """The rows `index`, with padding that only other rows needed cut away."""
        index = torch.as_tensor(index, dtype=torch.long)
        picked = {
            f.name: getattr(self, f.name)[index] for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        for name, length_name in self._widths.items():
            if name in picked:
                lengths = _total(picked, length_name)
                picked[name] = picked[name][..., : int(lengths.max()) if lengths.numel() else 0]
        return replace(self, **picked)

    def to(self, device: torch.device) -> Self:
        """The same batch with its tensors on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value.to(device) for name, value in moved.items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))


def _total(picked: dict[str, Any], length_name: str) -> Tensor:
    """`a+b` names the sum of two length fields."""
    return torch.stack([picked[name] for name in length_name.split("+")]).sum(0)


@dataclass(frozen=True)
class TokenBatch(_Rows):
    """Sequences with the tokens whose prediction is trained (SFT, pretraining, PTX)."""

    tokens: Tensor
    """[B, T] int64."""
    lengths: Tensor
    """[B] int64, ≥ 1."""
    loss_mask: Tensor
    """[B, T] bool; True at position t: the prediction *of* token t (from tokens < t) enters the loss. Never True at 0."""

    _widths: ClassVar[dict[str, str]] = {"tokens": "lengths", "loss_mask": "lengths"}

    def __post_init__(self) -> None:
        # On the CPU, where batches are made: on a GPU, `to` would have to wait for it.
        if self.loss_mask.is_cpu and self.loss_mask[:, :1].any():
            rows = self.loss_mask[:, 0].nonzero().flatten().tolist()
            raise ValueError(
                f"loss_mask is True at position 0 of rows {rows}, but no token is before a first token to predict it from; "
                "begin targets at position 1"
            )

    @property
    def num_targets(self) -> int:
        """Tokens that enter the loss."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class SequenceBatch(_Rows):
    """Whole sequences to be scored by a reward model."""

    tokens: Tensor
    """[B, T] int64."""
    lengths: Tensor
    """[B] int64, ≥ 1."""

    _widths: ClassVar[dict[str, str]] = {"tokens": "lengths"}


@dataclass(frozen=True)
class PreferenceBatch(_Rows):
    """Prompts with ranked responses, the best first; a pair is a ranking of two. Absent responses come last in a row."""

    tokens: Tensor
    """[P, K, T] int64, prompt and response, padded on the right."""
    lengths: Tensor
    """[P, K] int64; 0 where there is no response."""
    ranks: Tensor
    """[P, K] int64, rising along a row; equal ranks are a tie, of which nothing is learnt."""
    ratings: Tensor
    """[P, K] fp32, in whose differences the margins are given; all 0 where a record has none."""
    rated: Tensor
    """[P] bool, whether the record has margins."""

    _widths: ClassVar[dict[str, str]] = {"tokens": "lengths"}

    @classmethod
    def of(
        cls,
        responses: Sequence[Sequence[Sequence[int] | Tensor]],
        ranks: Sequence[Sequence[int]] | None = None,
        ratings: Sequence[Sequence[float]] | None = None,
        rated: Sequence[bool] | None = None,
    ) -> Self:
        """From each prompt's sequences; `ranks` None: no ties, `ratings` None: no margins; `rated` None: all or none, as
        `ratings`."""
        lengths = pad_rows([[len(row) for row in rows] for rows in responses])
        num_prompts, most = lengths.shape
        tokens = torch.zeros(num_prompts, most, int(lengths.max()) if lengths.numel() else 0, dtype=torch.long)
        for i, rows in enumerate(responses):
            for j, row in enumerate(rows):
                tokens[i, j, : len(row)] = torch.as_tensor(row, dtype=torch.long)
        return cls(
            tokens=tokens,
            lengths=lengths,
            ranks=pad_rows([range(len(rows)) for rows in responses] if ranks is None else ranks),
            ratings=torch.zeros(num_prompts, most) if ratings is None else pad_rows(ratings, dtype=torch.float32),
            rated=torch.full((num_prompts,), ratings is not None) if rated is None else torch.tensor(rated).bool(),
        )

    def rows(self, index: Sequence[int] | Tensor) -> Self:
        """The rows `index`, without what only other rows needed: responses as well as padding."""
        picked = super().rows(index)
        most = int(picked.num_responses.max()) if len(picked) else 0
        per_response = ("tokens", "lengths", "ranks", "ratings")
        return replace(picked, **{name: getattr(picked, name)[:, :most] for name in per_response})

    @property
    def present(self) -> Tensor:
        """[P, K] bool, True where there is a response."""
        return self.lengths > 0

    @property
    def num_responses(self) -> Tensor:
        """[P] int64."""
        return self.present.sum(1)

    @property
    def sequences(self) -> SequenceBatch:
        """The N responses that there are, in row-major order: what a reward model scores."""
        lengths = self.lengths[self.present]
        return SequenceBatch(self.tokens[self.present][:, : int(lengths.max()) if len(lengths) else 0], lengths)


@dataclass(frozen=True)
class PromptBatch(_Rows):
    """Prompts to generate from."""

    tokens: Tensor
    """[B, T] int64, padded on the right."""
    lengths: Tensor
    """[B] int64, ≥ 1."""
    sample_ids: Tensor
    """[B] int64, the identity that the counter-based random numbers of a response are drawn by; unique in a batch."""

    _widths: ClassVar[dict[str, str]] = {"tokens": "lengths"}


@dataclass(frozen=True)
class RolloutBatch(_Rows):
    """Prompts with generated responses."""

    tokens: Tensor
    """[B, T] int64, prompt, then response (EOS included where there is one), padded on the right."""
    prompt_lengths: Tensor
    """[B] int64, ≥ 1."""
    response_lengths: Tensor
    """[B] int64, ≥ 1, EOS included."""
    rollout_logprobs: Tensor
    """[B, R] fp32, log-probs of the response tokens under the distribution they were sampled from."""
    finish_reasons: Tensor
    """[B] int64, `FINISHED` or `TRUNCATED`."""
    policy_version: int
    """Version of the weights that generated the responses."""

    _widths: ClassVar[dict[str, str]] = {
        "tokens": "prompt_lengths+response_lengths",
        "rollout_logprobs": "response_lengths",
    }

    @property
    def lengths(self) -> Tensor:
        """[B] int64, prompt and response."""
        return self.prompt_lengths + self.response_lengths

    @property
    def response_mask(self) -> Tensor:
        """[B, R] bool, True on response tokens."""
        return length_mask(self.response_lengths, self.rollout_logprobs.shape[1])

    @property
    def sequences(self) -> SequenceBatch:
        """What a reward model scores."""
        return SequenceBatch(self.tokens, self.lengths)


@dataclass(frozen=True)
class Experience(_Rows):
    """What the policy and the value function learn from. Padding positions hold 0."""

    tokens: Tensor
    """[B, T] int64, prompt, then response, padded on the right."""
    prompt_lengths: Tensor
    """[B] int64."""
    response_lengths: Tensor
    """[B] int64."""
    old_logprobs: Tensor
    """[B, R] fp32, log π_old of the response tokens."""
    old_values: Tensor
    """[B, R] fp32, V_old of the state before each response token."""
    advantages: Tensor
    """[B, R] fp32."""
    returns: Tensor
    """[B, R] fp32, the regression target of the value function."""
    ref_logprobs: Tensor
    """[B, R] fp32, log π_ref of the response tokens; for the KL as a term of the loss."""
    importance_weights: Tensor | None = None
    """[B, R] fp32, what the policy's loss of each token is multiplied by; None: 1."""

    _widths: ClassVar[dict[str, str]] = {
        "tokens": "prompt_lengths+response_lengths",
        **dict.fromkeys(
            ("old_logprobs", "old_values", "advantages", "returns", "ref_logprobs", "importance_weights"),
            "response_lengths",
        ),
    }

    @property
    def lengths(self) -> Tensor:
        """[B] int64, prompt and response."""
        return self.prompt_lengths + self.response_lengths

    @property
    def response_mask(self) -> Tensor:
        """[B, R] bool, True on response tokens."""
        return length_mask(self.response_lengths, self.old_logprobs.shape[1])


def concat_rows(batches: Sequence[Any]) -> Any:
    """Concatenate batches of one type along the batch axis, padding the other axes with zeros where widths differ."""
    first = batches[0]
    joined = {}
    for f in fields(first):
        parts = [getattr(b, f.name) for b in batches]
        if not isinstance(parts[0], Tensor):
            continue
        if parts[0].dim() > 1:
            widths = [max(p.shape[d] for p in parts) for d in range(1, parts[0].dim())]
            parts = [_padded(p, widths) for p in parts]
        joined[f.name] = torch.cat(parts)
    return replace(first, **joined)


def _padded(part: Tensor, widths: Sequence[int]) -> Tensor:
    """Zeros at the end of every axis but the first. `pad` takes the last axis first."""
    missing = [width - size for width, size in zip(widths, part.shape[1:], strict=True)]
    return torch.nn.functional.pad(part, [n for gap in reversed(missing) for n in (0, gap)])
