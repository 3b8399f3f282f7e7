"""Records: choosing, trimming and joining rows."""

from __future__ import annotations

import pytest
import torch
from support.tiny import experience_batch, prompt_batch, rollout_batch, token_batch

from rlhf_dist.core.batches import PreferenceBatch, TokenBatch, concat_rows, length_mask, pad_rows


def test_pad_rows():
    assert pad_rows([[1, 2, 3], [4]], value=9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad_rows([torch.tensor([True]), torch.tensor([True, False])], False, torch.bool).tolist() == [
        [True, False],
        [True, False],
    ]
    assert pad_rows([]).shape == (0, 0)
    assert pad_rows([[], []]).shape == (2, 0)


def test_length_mask():
    assert length_mask(torch.tensor([2, 0, 3]), 3).int().tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]


def test_rows_are_trimmed_to_the_longest_that_was_chosen():
    rollout = rollout_batch([2, 5, 3], [4, 1, 2])
    few = rollout.rows([2, 1])
    assert torch.equal(few.tokens, rollout.tokens[[2, 1], :6])
    assert few.rollout_logprobs.shape == (2, 2)
    assert few.lengths.tolist() == [5, 6]
    assert few.response_mask.int().tolist() == [[1, 1], [1, 0]]
    assert few.policy_version == rollout.policy_version
    assert len(few) == 2


def test_trimming_never_cuts_a_token():
    experience = experience_batch([2, 9, 3, 4], [5, 1, 2, 8])
    for row in range(4):
        alone = experience.rows([row])
        n, m = int(experience.lengths[row]), int(experience.response_lengths[row])
        assert torch.equal(alone.tokens[0], experience.tokens[row, :n])
        for name in ("old_logprobs", "old_values", "advantages", "returns"):
            assert torch.equal(getattr(alone, name)[0], getattr(experience, name)[row, :m])


RANKINGS = PreferenceBatch.of(
    [[[1, 2], [3]], [[4], [5, 6, 7, 8], [9]], [[7], [8, 9]]],
    ranks=[[0, 1], [0, 0, 2], [0, 1]],
    ratings=[[0.5, 0.0], [3.0, 3.0, 1.0], [0.0, 0.0]],
)


def test_rankings_lose_the_responses_and_the_padding_that_others_needed():
    pairs = RANKINGS.rows([2, 0])
    assert pairs.tokens.tolist() == [[[7, 0], [8, 9]], [[1, 2], [3, 0]]]
    assert pairs.lengths.tolist() == [[1, 2], [2, 1]]
    assert pairs.ranks.tolist() == [[0, 1], [0, 1]]
    assert pairs.ratings.tolist() == [[0.0, 0.0], [0.5, 0.0]]
    assert RANKINGS.rows([1]).ranks.tolist() == [[0, 0, 2]]
    assert RANKINGS.rows([]).rows([]).tokens.shape == (0, 0, 0)


def test_the_sequences_of_rankings_are_the_responses_that_there_are():
    assert RANKINGS.num_responses.tolist() == [2, 3, 2]
    assert RANKINGS.present.int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]
    sequences = RANKINGS.sequences
    assert sequences.lengths.tolist() == [2, 1, 1, 4, 1, 1, 2]
    rows = [row[:n].tolist() for row, n in zip(sequences.tokens, sequences.lengths.tolist(), strict=True)]
    assert rows == [[1, 2], [3], [4], [5, 6, 7, 8], [9], [7], [8, 9]]
    assert RANKINGS.rows([0, 2]).sequences.tokens.shape == (4, 2)


def test_rankings_without_ranks_and_ratings_have_neither_ties_nor_margins():
    batch = PreferenceBatch.of([[[1], [2], [3]], [[4], [5]]])
    assert batch.ranks.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert not batch.ratings.any()
    assert batch.ratings.dtype == torch.float32


def test_no_rows_is_a_batch_too():
    for batch in (token_batch([3, 4]), rollout_batch([2], [3]), experience_batch([2], [3]), prompt_batch([4])):
        empty = batch.rows([])
        assert len(empty) == 0
        assert empty.tokens.shape == (0, 0)
        assert empty.rows(torch.zeros(0, dtype=torch.long)).tokens.shape == (0, 0)


def test_rows_may_repeat_and_reorder():
    batch = token_batch([3, 5, 4])
    again = batch.rows([1, 1, 0])
    assert torch.equal(again.tokens[0], again.tokens[1])
    assert torch.equal(again.lengths, torch.tensor([5, 5, 3]))


def test_num_targets_counts_the_loss_mask():
    batch = token_batch([3, 5, 4])
    assert batch.num_targets == int(batch.loss_mask.sum()) == sum(batch.rows([i]).num_targets for i in range(3))


def test_concat_rows_undoes_a_split():
    experience = experience_batch([2, 9, 3, 4], [5, 1, 2, 8])
    joined = concat_rows([experience.rows([0, 1]), experience.rows([2]), experience.rows([]), experience.rows([3])])
    assert joined.importance_weights is experience.importance_weights is None
    for name, tensor in vars(experience).items():
        assert tensor is None or torch.equal(getattr(joined, name), tensor), name


def test_concat_rows_joins_rankings_of_different_sizes():
    joined = concat_rows([RANKINGS.rows([0]), RANKINGS.rows([1, 2])])
    for name, tensor in vars(RANKINGS).items():
        assert torch.equal(getattr(joined, name), tensor), name


def test_concat_rows_keeps_masks_bool():
    joined = concat_rows([token_batch([3]), token_batch([6])])
    assert joined.loss_mask.dtype == torch.bool
    assert not joined.loss_mask[0, 3:].any()


def test_a_first_token_cannot_be_a_target():
    """A padded pass would skip it, and a packed one would predict it from the sequence before."""
    mask = torch.tensor([[False, True], [True, True], [True, False]])
    with pytest.raises(ValueError, match=r"loss_mask is True at position 0 of rows \[1, 2\].*position 1"):
        TokenBatch(torch.ones(3, 2, dtype=torch.long), torch.full((3,), 2), mask)


def test_no_rows_and_rows_elsewhere_are_no_first_targets():
    batch = token_batch([4, 1, 3])
    assert batch.rows([]).loss_mask.shape == (0, 0)
    assert batch.rows([1]).num_targets == 0
    assert batch.to(torch.device("meta")).loss_mask.is_meta  # as on a GPU, where a look would wait for it
