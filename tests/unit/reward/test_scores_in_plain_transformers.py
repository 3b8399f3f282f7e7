"""What is saved gives, in plain transformers with default arguments, the scores that `rlhf-dist eval` gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny import hosted, save_tiny_lm, tiny_tokenizer, trained
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_dist.config.hosting import FrozenModel
from rlhf_dist.core.batches import PreferenceBatch, SequenceBatch, pad_rows
from rlhf_dist.distributed.role_groups import RewardRole
from rlhf_dist.distributed.workers.reward import RewardWorker
from rlhf_dist.models.loading import load_model_config
from rlhf_dist.reward.roles import PreferenceModelRole
from rlhf_dist.reward.worker import PreferenceModelWorker
from rlhf_dist.run.checks import check_same_tokenizer

LENGTHS = [7, 12, 4, 9]


@pytest.fixture(params=["exact", "padded"])
def without_pad(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A language model as GPT-2 is: no pad token, and none that could be one; with and without spare rows."""
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token_id
    path = save_tiny_lm(
        tmp_path / "lm", vocab_size=len(tokenizer) + (64 if request.param == "padded" else 0), pad_token_id=eos
    )
    file = path / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<pad>", "<first>"), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}', encoding="utf-8"
    )
    (path / "special_tokens_map.json").unlink(missing_ok=True)
    assert AutoTokenizer.from_pretrained(path).pad_token is None
    return path


@pytest.mark.parametrize("stage", [0, 3])
def test_a_reward_model_of_a_tokenizer_without_pad_token(without_pad: Path, tmp_path: Path, stage: int):
    eos = tiny_tokenizer().eos_token_id
    g = torch.Generator().manual_seed(0)
    # Each ends in EOS, as responses do, and one in two: the last is what is scored.
    rows = [torch.cat([torch.randint(2, 250, (n - 1,), generator=g), torch.tensor([eos])]) for n in LENGTHS]
    rows[1][-2] = eos
    with hosted(PreferenceModelWorker, config=trained(without_pad, zero_stage=stage), num_steps=1) as group:
        role = PreferenceModelRole(group, 2)
        role.update(PreferenceBatch.of([rows[:2], rows[2:]]), 0).result()
        role.save(tmp_path)
    saved = tmp_path / "model"
    with hosted(RewardWorker, config=FrozenModel(model_path=str(saved), precision="fp32")) as group:
        batch = SequenceBatch(pad_rows(rows), torch.tensor(LENGTHS))
        scores = RewardRole(group, 2).score(batch).result()
    tokenizer = AutoTokenizer.from_pretrained(saved)
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    assert tokenizer.pad_token_id == model.config.pad_token_id != eos
    for side in ("right", "left"):
        padded = tokenizer.pad({"input_ids": [row.tolist() for row in rows]}, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            plain = model(**padded).logits.squeeze(1)
        torch.testing.assert_close(plain, scores, rtol=1e-4, atol=1e-5)
    # The policy that it is to score has one token less.
    check_same_tokenizer(
        AutoTokenizer.from_pretrained(without_pad), str(saved), load_model_config(str(saved)), "reward"
    )
