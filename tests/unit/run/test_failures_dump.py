"""What is written down of an aborted step's samples."""

from __future__ import annotations

import json
import math

import torch
from support.trainers import decode

from rlhf_dist.core.batches import PreferenceBatch, TokenBatch
from rlhf_dist.run.failures import sample_dump


def test_a_ranking_is_written_with_a_text_for_every_response():
    batch = PreferenceBatch.of(
        [[torch.tensor([5, 6]), torch.tensor([7])], [torch.tensor([8, 9, 4]), torch.tensor([2])]]
    )
    (record,) = sample_dump("rm", batch, [1], decode)
    assert (record["source"], record["row"], record["texts"]) == ("rm", 1, ["8 9 4", "2"])


def test_what_is_not_a_number_can_be_read_back_from_json():
    batch = TokenBatch(torch.tensor([[3, 4, 0]]), torch.tensor([2]), torch.tensor([[False, True, False]]))
    values = PreferenceBatch.of([[torch.tensor([1]), torch.tensor([2])]], ratings=[[math.inf, math.nan]])
    (text,) = sample_dump("lm", batch, [0], decode)
    (ranking,) = sample_dump("rm", values, [0])
    assert text["tokens"] == [3, 4]
    assert text["text"] == "3 4"
    assert json.loads(json.dumps(ranking, allow_nan=False))["ratings"] == ["inf", "nan"]
