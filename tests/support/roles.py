"""In place of the roles: they answer at once with numbers that can be checked, and record what is asked, in order."""

from __future__ import annotations

import copy
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlhf_dist.core.batches import FINISHED, TRUNCATED, RolloutBatch, length_mask, pad_rows
from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.core.steps import UpdateReport

Events = list[tuple[Any, ...]]


class Answer(Future):
    """A future that records when it is waited for."""

    def __init__(self, events: Events, name: str, value: Any) -> None:
        super().__init__()
        self._events, self._name, self._value = events, name, value
        self.set_result(value)

    def result(self, timeout: float | None = None) -> Any:
        self._events.append(("wait", self._name))
        return super().result(timeout)


class FakeTrained:
    """In place of a trained model: its state is a number that updates add to."""

    def __init__(self, events: Events, name: str) -> None:
        self.events, self.name, self.state = events, name, 0.0

    def answer(self, call: str, value: Any, *details: Any) -> Answer:
        self.events.append((f"{self.name}.{call}", *details))
        return Answer(self.events, f"{self.name}.{call}", value)

    def save_checkpoint(self, path: Path) -> Answer:
        path.mkdir(parents=True)
        (path / "state").write_text(repr(self.state), encoding="utf-8")
        return self.answer("save", None)

    def load_checkpoint(self, path: Path) -> Answer:
        self.state = float((path / "state").read_text(encoding="utf-8"))
        return self.answer("load", None)

    def save(self, folder: Path) -> Answer:
        (folder / "model").mkdir(parents=True)
        return self.answer("save_result", None)


class FakePolicy(FakeTrained):
    """In place of the policy: log-probs of −1, and a state that remembers every row and text it learned from."""

    def logprobs(self, rollout: RolloutBatch) -> Answer:
        return self.answer("logprobs", torch.where(rollout.response_mask, -1.0, 0.0))

    def update(
        self, experience: Any, steps: Any, ptx: Any, kl_loss_coef: float = 0.0, measure_terms: bool = False
    ) -> Answer:
        for rows in steps:
            # Not linear, so that the order of rows and steps matters.
            for row in rows.tolist():
                self.state = (self.state * 1.1 + float(experience.advantages[row].sum()) + row) % 1000
        for batch in ptx or []:
            self.state = (self.state * 1.1 + float(batch.tokens.sum())) % 1000
        details = [rows.tolist() for rows in steps], [len(b) for b in ptx] if ptx is not None else None
        return self.answer("update", UpdateReport({"policy/loss": self.state}, len(steps)), *details)


class FakeValue(FakeTrained):
    """In place of the value function: values of one half."""

    def values(self, rollout: RolloutBatch) -> Answer:
        states = length_mask(rollout.response_lengths + 1, rollout.response_mask.shape[1] + 1)
        return self.answer("values", torch.where(states, 0.5, 0.0))

    def update(self, experience: Any, steps: Any) -> Answer:
        self.state += 1
        return self.answer("update", UpdateReport({"value/loss": self.state}, len(steps)))


class FakeReference(FakeTrained):
    """In place of the reference: log-probs of −1.5."""

    def logprobs(self, rollout: RolloutBatch) -> Answer:
        return self.answer("logprobs", torch.where(rollout.response_mask, -1.5, 0.0))


class FakeReward(FakeTrained):
    """In place of the reward model: a tenth of the last token."""

    def score(self, sequences: Any) -> Answer:
        return self.answer("score", sequences.tokens.gather(1, sequences.lengths[:, None] - 1)[:, 0].float() / 10)


class FakeRollout(FakeTrained):
    """In place of a rollout engine: two tokens a prompt, made of stream, iteration, sample and the policy's state."""

    def __init__(self, events: Events, policy: FakePolicy) -> None:
        super().__init__(events, "rollout")
        self.policy, self.state, self.version = policy, 0.0, 0

    def probe(self, prompts: Any) -> Answer:
        silent = copy.copy(self)
        silent.events = []
        return Answer(self.events, "rollout.probe", silent.generate(prompts, stream="probe", iteration=0)._value)

    def generate(self, prompts: Any, *, stream: str, iteration: int) -> Answer:
        ids = prompts.sample_ids.tolist()
        salt = len(stream) + iteration + int(self.state)
        tokens = [
            [*row[:n].tolist(), 100 + (i + salt) % 50, 200 + (7 * i + salt) % 50]
            for row, n, i in zip(prompts.tokens, prompts.lengths.tolist(), ids, strict=True)
        ]
        lengths = torch.full((len(ids),), 2)
        batch = RolloutBatch(
            pad_rows(tokens),
            prompts.lengths,
            lengths,
            torch.where(length_mask(lengths, 2), -1.0, 0.0),
            torch.full((len(ids),), FINISHED),
            self.version,
        )
        return self.answer("generate", batch, stream, iteration, ids, self.version)


class RaggedRollout(FakeRollout):
    """As `FakeRollout`, with responses of one to three tokens, as sample ids have it; every second is cut off."""

    def generate(self, prompts: Any, *, stream: str, iteration: int) -> Answer:
        two = super().generate(prompts, stream=stream, iteration=iteration)._value
        ids = prompts.sample_ids
        lengths = 1 + ids % 3
        rows = [
            [*row[: n + 1].tolist(), *([300 + i] * (m - 1))]
            for row, n, i, m in zip(
                two.tokens, two.prompt_lengths.tolist(), ids.tolist(), lengths.tolist(), strict=True
            )
        ]
        logprobs = torch.where(length_mask(lengths, int(lengths.max())), -1.0, 0.0)
        ragged = replace(
            two,
            tokens=pad_rows(rows),
            response_lengths=lengths,
            rollout_logprobs=logprobs,
            finish_reasons=torch.where(ids % 2 == 0, FINISHED, TRUNCATED),
        )
        return Answer(self.events, "rollout.generate", ragged)


class FakeWeightSync:
    """In place of the weight transfer."""

    def __init__(self, events: Events, policy: FakePolicy, rollout: FakeRollout) -> None:
        self.events, self.policy, self.rollout = events, policy, rollout

    def push(self, version: int) -> Answer:
        self.rollout.state, self.rollout.version = self.policy.state, version
        self.events.append(("sync", version))
        return Answer(self.events, "sync", None)


class FailsToSave(FakeTrained):
    """In place of a model whose disk is full."""

    def save_checkpoint(self, path: Path) -> Answer:
        path.mkdir(parents=True)
        (path / "half").write_text("", encoding="utf-8")
        raise RunFolderError("disk full")
