"""The roles over several ranks: every rank gets its own rows, and answers come back in the batch's order.

The ranks are real objects in this process that compute from the rows they are sent, so a row that goes to the wrong
place, or comes back to one, changes the result.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import torch
from support.tiny import experience_batch, prompt_batch, rollout_batch, token_batch

from rlhf_dist.core.batches import PreferenceBatch, RolloutBatch, concat_rows
from rlhf_dist.core.errors import TrainingError
from rlhf_dist.core.futures import completed
from rlhf_dist.core.steps import StepReport
from rlhf_dist.distributed.partition import MicroBatching
from rlhf_dist.distributed.role_groups import ReferenceRole, RewardRole
from rlhf_dist.distributed.rollout_engines import Engines, GroupWeightSync, RolloutRole
from rlhf_dist.ppo.roles import PolicyRole, ValueRole
from rlhf_dist.reward.roles import PreferenceModelRole
from rlhf_dist.sft.roles import LanguageModelRole


class ThreeRanks:
    """In place of a group of actors: `worker(rank)` made for each rank, called one after the other."""

    role = "test"

    def __init__(self, worker: Any, num_ranks: int = 3) -> None:
        self.num_ranks = num_ranks
        self.workers = [worker(rank) for rank in range(num_ranks)]

    def call(self, method: str, *args: Any, ranks: Any = None) -> Future[list[Any]]:
        return completed([getattr(worker, method)(*args) for worker in self._chosen(ranks)])

    def scatter(self, method: str, args_per_rank: Any, ranks: Any = None) -> Future[list[Any]]:
        calls = zip(self._chosen(ranks), args_per_rank, strict=True)
        return completed([getattr(worker, method)(*args) for worker, args in calls])

    def pipe(
        self, method: str, args: tuple[Any, ...], target: Any, target_method: str, target_ranks: Any = None
    ) -> Future[None]:
        sent = self.call(method, *args).result()[0]
        target.call(target_method, sent, ranks=target_ranks)
        return completed(None)

    def restart(self, ranks: Any) -> None:
        raise AssertionError(f"nothing died, but ranks {ranks} are started again")

    def _chosen(self, ranks: Any) -> list[Any]:
        return self.workers if ranks is None else [self.workers[rank] for rank in ranks]


class Echo:
    """Answers with numbers made of the tokens of the rows it is sent, and keeps what it was asked."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.version = 5
        self.calls: list[Any] = []

    def logprobs(self, rollout: Any, micro_batches: list[list[int]]) -> torch.Tensor:
        self.calls.append(micro_batches)
        out = torch.zeros(len(rollout), int(rollout.response_lengths.max()) if len(rollout) else 0)
        for row in [row for micro in micro_batches for row in micro]:
            n, m = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
            out[row, :m] = rollout.tokens[row, n : n + m].float()
        return out

    values = logprobs

    def score(self, sequences: Any, micro_batches: list[list[int]]) -> torch.Tensor:
        return torch.tensor([float(row[: int(n)].sum()) for row, n in zip(sequences.tokens, sequences.lengths)])  # noqa: B905

    def score_pairs(self, batch: Any, micro_batches: list[list[int]]) -> torch.Tensor:
        self.calls.append(
            [batch.num_responses[micro].sum() * batch.lengths[micro].max() for micro in micro_batches if micro]
        )
        return batch.tokens.sum(2).float()

    def evaluate(self, batch: Any, micro_batches: list[list[int]]) -> dict[str, float]:
        return {"nll": float(batch.tokens.sum()), "num_targets": float(batch.num_targets)}

    def generate(self, prompts: Any, micro_batches: list[list[int]], stream: str, iteration: int) -> Any:
        """The response of a prompt is its own tokens, doubled."""
        if len(prompts) == 0:
            return None
        parts = []
        for i in range(len(prompts)):
            n = int(prompts.lengths[i])
            row = prompts.tokens[i, :n]
            parts.append(
                RolloutBatch(
                    torch.cat([row, row + 1000])[None],
                    prompts.lengths[i : i + 1],
                    torch.tensor([n]),
                    prompts.sample_ids[i].float().expand(1, n),
                    torch.tensor([0]),
                    self.version,
                )
            )
        return concat_rows(parts)

    def update(self, batch: Any, micro_batches: Any, count: int, step: int, text: Any = None) -> StepReport:
        self.calls.append((batch, micro_batches, count, step) + (() if text is None else (text,)))
        sums = {"lm": {"loss": sum(float(batch.rows(micro).num_targets) * 2 for micro in micro_batches)}}
        if text is not None:
            targets = sum(float(text.batch.rows(micro).num_targets) for micro in text.micro_batches)
            sums["pretraining"] = {"loss": targets * 5}
        return StepReport(sums, grad_norm=1.5, learning_rate=0.1)

    def update_ppo(
        self, experience: Any, steps: Any, ptx: Any, kl_loss_coef: float, measure_terms: bool
    ) -> list[StepReport]:
        self.calls.append((experience, steps, ptx))
        reports = []
        for i, step in enumerate(steps):
            picked = [experience.rows(micro) for micro in step.micro_batches]
            sums = {"ppo": {"loss": sum(float(p.advantages.sum()) for p in picked), "ratio": 0.0}}
            if ptx is not None:
                texts = [ptx[i].rows(micro) for micro in step.ptx_micro_batches]
                sums["ptx"] = {"loss": float(sum(t.num_targets for t in texts)) * 3}
            reports.append(StepReport(sums, grad_norm=float(i), learning_rate=0.1 * (i + 1)))
        return reports


@pytest.fixture
def group() -> ThreeRanks:
    return ThreeRanks(Echo)


ROLLOUT = rollout_batch([3, 1, 6, 2, 9, 4, 2], [2, 7, 1, 4, 3, 5, 2])


@pytest.mark.parametrize("num_rows", [7, 4, 2, 1])  # with 2 rows and 1 row there are idle ranks
@pytest.mark.parametrize("size", [1, 2, 8])
def test_row_results_come_back_in_order(group: ThreeRanks, num_rows: int, size: int):
    rollout = ROLLOUT.rows(range(num_rows))
    expected = Echo(0).logprobs(rollout, [list(range(num_rows))])
    for role, method in (
        (PolicyRole, "logprobs"),
        (ReferenceRole, "logprobs"),
        (ValueRole, "values"),
    ):
        assert torch.equal(getattr(role(group, size), method)(rollout).result(), expected)
    sequences = rollout.sequences
    assert torch.equal(RewardRole(group, size).score(sequences).result(), Echo(0).score(sequences, []))


def test_all_ranks_run_the_same_number_of_micro_batches(group: ThreeRanks):
    PolicyRole(group, 2).logprobs(ROLLOUT).result()
    assert {len(worker.calls[0]) for worker in group.workers} == {2}


def test_pairs_come_back_in_order(group: ThreeRanks):
    chosen, rejected = [[1], [2, 3], [4, 5, 6], [7] * 9, [8]], [[9] * 7, [1], [2, 2], [3], [4, 4, 4, 4]]
    batch = PreferenceBatch.of(list(zip(chosen, rejected, strict=True)))
    scores = PreferenceModelRole(group, 2).score_pairs(batch).result()
    assert scores.tolist() == [[sum(c), sum(r)] for c, r in zip(chosen, rejected, strict=True)]


def test_rankings_of_different_sizes_come_back_in_order(group: ThreeRanks):
    responses = [[[1], [2, 3]], [[4], [5], [6, 6, 6], [7]], [[8], [9]], [[1] * 9, [3] * 8, [2]], [[4], [2]]]
    batch = PreferenceBatch.of(responses)
    expected = [[sum(row) for row in rows] + [0] * (4 - len(rows)) for rows in responses]
    assert PreferenceModelRole(group, 1).score_pairs(batch).result().tolist() == expected
    budget = MicroBatching(size=1, tokens=27)
    assert PreferenceModelRole(group, budget).score_pairs(batch).result().tolist() == expected
    assert max(cost for worker in group.workers for cost in worker.calls[-1]) == 27  # three responses of up to 9 tokens


@pytest.mark.parametrize("num_rows", [6, 2])
def test_rollouts_come_back_in_the_order_of_their_prompts(group: ThreeRanks, num_rows: int):
    prompts = prompt_batch([4, 9, 1, 7, 7, 2]).rows(range(num_rows))
    rollout = RolloutRole(group, 2).generate(prompts, stream="s", iteration=0).result()
    assert len(rollout) == num_rows
    assert torch.equal(rollout.prompt_lengths, prompts.lengths)
    for i, n in enumerate(prompts.lengths.tolist()):
        assert torch.equal(rollout.tokens[i, :n], prompts.tokens[i, :n])
        assert torch.equal(rollout.tokens[i, n : 2 * n], prompts.tokens[i, :n] + 1000)
        assert (rollout.rollout_logprobs[i, :n] == prompts.sample_ids[i]).all()
    assert rollout.policy_version == 5


def test_engines_of_different_versions_stop_the_run(group: ThreeRanks):
    group.workers[1].version = 6
    with pytest.raises(TrainingError, match=r"versions \[5, 6\]"):
        RolloutRole(group, 2).generate(prompt_batch([3, 4, 5]), stream="s", iteration=0).result()


def test_evaluation_adds_up_over_ranks(group: ThreeRanks):
    batch = token_batch([3, 8, 5, 2, 6])
    sums = LanguageModelRole(group, 1).evaluate(batch).result()
    assert sums == {"nll": float(batch.tokens.sum()), "num_targets": float(batch.num_targets)}


def test_every_rank_divides_by_the_count_of_all(group: ThreeRanks):
    batch = token_batch([3, 8, 5, 2, 6])
    report = LanguageModelRole(group, 1).update(batch, 7).result()
    assert {(count, step) for worker in group.workers for *_, count, step in worker.calls} == {(batch.num_targets, 7)}
    assert report.metrics["sft/loss"] == pytest.approx(2)  # each target counted once, whatever its rank
    assert report.metrics["train/grad_norm"] == 1.5


@pytest.mark.parametrize("num_texts", [5, 1])  # with 1 text, two ranks have none
def test_text_beside_a_batch_is_split_and_counted_by_itself(group: ThreeRanks, num_texts: int):
    batch, text = token_batch([3, 8, 5, 2, 6]), token_batch([9, 4, 7, 3, 5][:num_texts], seed=1)
    report = LanguageModelRole(group, 1).update(batch, 7, text, 0.25).result()
    sent = []
    for worker in group.workers:
        *_, count, step, share = worker.calls[0]
        assert (count, step, share.num_targets, share.coefficient) == (batch.num_targets, 7, text.num_targets, 0.25)
        sent += [share.batch.rows([row]).tokens[0].tolist() for micro in share.micro_batches for row in micro]
    assert sorted(sent) == sorted(text.rows([row]).tokens[0].tolist() for row in range(num_texts))
    assert len({len(worker.calls[0][-1].micro_batches) for worker in group.workers}) == 1
    assert report.metrics["sft/loss"] == pytest.approx(2)
    assert report.metrics["sft/pretraining_loss"] == pytest.approx(5)  # before the coefficient


def test_a_ppo_update_sends_every_row_of_every_step_once(group: ThreeRanks):
    experience = experience_batch([3, 1, 6, 2, 9, 4, 2], [2, 7, 1, 4, 3, 5, 2])
    steps = [torch.tensor([0, 6, 3, 2]), torch.tensor([5, 1, 4]), torch.tensor([6])]
    ptx = [token_batch([4, 3], seed=1), token_batch([9, 2, 5, 6], seed=2), token_batch([3], seed=3)]
    report = PolicyRole(group, 1).update(experience, steps, ptx).result()
    for i, rows in enumerate(steps):
        sent, texts = [], []
        for worker in group.workers:
            mine, shares, mine_ptx = worker.calls[0]
            share = shares[i]
            assert share.num_tokens == int(experience.response_lengths[rows].sum())
            assert share.num_ptx_targets == ptx[i].num_targets
            sent += [tuple(mine.rows([row]).tokens[0].tolist()) for micro in share.micro_batches for row in micro]
            texts += [
                tuple(mine_ptx[i].rows([row]).tokens[0].tolist()) for micro in share.ptx_micro_batches for row in micro
            ]
        assert sorted(sent) == sorted(tuple(experience.rows([row]).tokens[0].tolist()) for row in rows)
        assert sorted(texts) == sorted(tuple(ptx[i].rows([row]).tokens[0].tolist()) for row in range(len(ptx[i])))
        assert len({len(w.calls[0][1][i].micro_batches) for w in group.workers}) == 1
        assert len({len(w.calls[0][1][i].ptx_micro_batches) for w in group.workers}) == 1
    means = [float(experience.advantages[rows].sum() / experience.response_lengths[rows].sum()) for rows in steps]
    assert report.metrics["policy/loss"] == pytest.approx(sum(means) / 3, abs=1e-6)
    assert report.metrics["policy/ptx_loss"] == pytest.approx(3)
    assert report.metrics["policy/grad_norm"] == 1.0  # the mean of 0, 1, 2
    assert report.metrics["policy/learning_rate"] == pytest.approx(0.3)  # of the last step
    assert report.num_steps == 3


def test_a_ppo_update_without_text_reports_no_ptx_loss(group: ThreeRanks):
    experience = experience_batch([3, 1], [2, 7])
    report = PolicyRole(group, 1).update(experience, [torch.tensor([1, 0])], None).result()
    assert "policy/ptx_loss" not in report.metrics
    assert all(worker.calls[0][2] is None for worker in group.workers)


class Weights:
    """In place of the two ends of a weight transfer."""

    events: list[Any] = []

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.answer = (3, 42)

    def num_buckets(self) -> int:
        return 2

    def export_bucket(self, index: int) -> Any:
        Weights.events.append(("export", self.rank, index))
        return {"w": index} if self.rank == 0 else None

    def export_checksum(self) -> int:
        return 42 if self.rank == 0 else 0

    def load_bucket(self, bucket: Any) -> None:
        Weights.events.append(("load", self.rank, bucket["w"]))

    def finish_sync(self, version: int) -> tuple[int, int]:
        return self.answer


def test_weights_go_a_bucket_at_a_time_from_rank_0_to_every_engine():
    Weights.events = []
    policy, engines = ThreeRanks(Weights, 2), ThreeRanks(Weights)
    GroupWeightSync(policy, Engines(engines)).push(3).result()
    one = [[("export", 0, i), ("export", 1, i), *(("load", rank, i) for rank in range(3))] for i in range(2)]
    assert Weights.events == one[0] + one[1]


@pytest.mark.parametrize("answer", [(2, 42), (3, 41)])  # another version, another checksum
def test_an_engine_that_is_not_up_to_date_stops_the_run(answer: tuple[int, int]):
    engines = ThreeRanks(Weights)
    engines.workers[2].answer = answer
    with pytest.raises(TrainingError, match=r"version 3 \(checksum 42\), rollout ranks \[2\]"):
        GroupWeightSync(ThreeRanks(Weights, 1), Engines(engines)).push(3).result()
