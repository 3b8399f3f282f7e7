"""hpZ, the second partition of ZeRO-3's parameters inside a node, against plain ZeRO-3: four ranks, two "nodes" of two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.tiny import token_batch, trained

from rlhf_dist.config.hosting import TrainedModel
from rlhf_dist.distributed.deepspeed import zero
from rlhf_dist.distributed.deepspeed.process_group import RankContext
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker

SHARED = Path(__file__).resolve().parents[4] / "ds_configs"
BATCHES = [token_batch([9, 4, 13, 6, 7, 5], seed=step) for step in range(4)]


def train(context: RankContext, config: TrainedModel, folder: Path) -> dict[str, Any]:
    """Four steps, each after an evaluation; then back to the checkpoint after two, and the last two once more."""
    worker = LanguageModelWorker(config, context, num_steps=4)
    mine = [[row for row in range(6) if row % context.world_size == context.rank]]

    def steps(some: range) -> list[float]:
        numbers = []
        for step in some:
            batch = BATCHES[step]
            numbers.append(worker.evaluate(batch, mine)["nll"])
            numbers.append(worker.update(batch, mine, batch.num_targets, step).grad_norm)
        return numbers

    def weights() -> dict[str, torch.Tensor]:
        return {k: t.clone() for part in zero.whole_parameters(worker.model, 1) for k, t in part.items()}

    numbers = steps(range(2))
    worker.save_checkpoint(folder)
    numbers += steps(range(2, 4))
    after = weights()
    worker.evaluate(BATCHES[0], mine)
    seconds = [
        (p.ds_secondary_tensor.numel(), p.ds_tensor.numel())
        for p in worker.model.parameters()
        if p.ds_secondary_tensor is not None
    ]
    worker.load_checkpoint(folder)  # the second partition must not keep the weights of before
    again = steps(range(2, 4))
    return {"numbers": numbers, "weights": after, "seconds": seconds, "again": again, "weights again": weights()}


@pytest.mark.slow
def test_it_changes_nothing_but_where_parameters_come_from(tiny_lm: Path, tmp_path: Path):
    results = []
    for name in ("zero3", "zero3_hpz"):
        file = json.loads((SHARED / f"{name}.json").read_text(encoding="utf-8"))
        file["zero_optimization"]["stage3_param_persistence_threshold"] = (
            0  # else everything of a tiny model stays whole
        )
        if name == "zero3_hpz":
            file["zero_optimization"]["zero_hpz_partition_size"] = 2
        folder = tmp_path / name
        folder.mkdir()
        (folder / "ds.json").write_text(json.dumps(file), encoding="utf-8")
        config = trained(tiny_lm, zero_stage=3, num_ranks=4, ds_config_path=folder / "ds.json")
        results.append(run_ranks(4, train, folder, config, folder / "checkpoint"))
    for plain, hpz in zip(*results, strict=True):
        assert not plain["seconds"]
        # The whole of a matrix on two ranks, beside the quarter of it on each of four.
        assert len(hpz["seconds"]) > 10
        assert all(second == 2 * first for second, first in hpz["seconds"])
        assert hpz["numbers"] == pytest.approx(plain["numbers"], rel=1e-6)
        assert hpz["again"] == hpz["numbers"][4:]
        for key, tensor in plain["weights"].items():
            assert torch.allclose(hpz["weights"][key], tensor, atol=1e-6)
            assert torch.equal(hpz["weights again"][key], hpz["weights"][key])
