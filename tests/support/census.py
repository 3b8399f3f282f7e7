"""The tensors that a real trained model holds on each rank, by what they are for.

`take` starts ranks as processes of their own, builds workers in them one after the other, trains two steps, and takes a
census of all tensors of the process: at the boundary of the second step (between its last backward pass and the optimizer),
and after it.
"""

from __future__ import annotations

import gc
import json
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

Storages = dict[int, int]
"""Address → bytes: tensors that share memory count once."""


def take(cases: list[dict[str, Any]], num_ranks: int) -> list[list[dict[str, dict[str, int]]]]:
    """Case → rank → {"boundary", "after"} → what the bytes are for → bytes.

    A case is `path` (a model), `scalar`, and keys of its `TrainedModel`.
    """
    from rlhf_dist.distributed.deepspeed.process_group import free_port

    with tempfile.TemporaryDirectory() as folder:
        arguments = (num_ranks, free_port(), cases, folder)
        torch.multiprocessing.start_processes(_rank, arguments, nprocs=num_ranks, start_method="spawn")
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(num_ranks)]
    return [list(of_ranks) for of_ranks in zip(*ranks, strict=True)]


def _rank(rank: int, num_ranks: int, port: int, cases: list[dict[str, Any]], folder: str) -> None:
    from rlhf_dist.distributed.deepspeed.process_group import RankContext, join_process_group, prepare_process

    warnings.filterwarnings("ignore")
    context = RankContext(rank=rank, world_size=num_ranks, master_port=port)
    prepare_process(context)
    join_process_group(context)
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: (
        True
    )  # torch computes in it on any CPU; this process is the test's own
    found = [_census(case, context) for case in cases]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def _census(case: dict[str, Any], context: Any) -> dict[str, dict[str, int]]:
    from rlhf_dist.core.batches import PreferenceBatch
    from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
    from rlhf_dist.reward.worker import PreferenceModelWorker
    from support.tiny import token_batch, trained

    earlier = list(_all_tensors())  # held, so that nothing new gets their addresses
    before = storages(earlier)
    settings = {key: value for key, value in case.items() if key not in ("path", "scalar")}
    config = trained(Path(case["path"]), **settings)
    batch = token_batch([5, 7, 6, 4])
    if case["scalar"]:
        worker: Any = PreferenceModelWorker(config=config, context=context, num_steps=4)
        pairs = PreferenceBatch.of(
            [[batch.tokens[0, :5], batch.tokens[1, :7]], [batch.tokens[2, :6], batch.tokens[3, :4]]]
        )
        arguments: tuple[Any, ...] = (pairs, [[0], [1]], 2 * context.world_size, 0)
    else:
        worker = LanguageModelWorker(config=config, context=context, num_steps=4)
        if config.lora is None:
            worker.engine.keep_average(0.9)
        arguments = (batch, [[0, 1], [2, 3]], batch.num_targets * context.world_size, 0)
    engine = worker.engine._engine
    found: dict[str, dict[str, int]] = {}
    take_step = engine.step

    def step() -> None:
        found["boundary"] = sorted_out(worker.engine, before)
        take_step()

    engine.step = step
    worker.update(*arguments)
    worker.update(*arguments)
    engine.step = take_step
    found["after"] = sorted_out(worker.engine, before)
    return found


def sorted_out(engine: Any, before: Storages) -> dict[str, int]:
    """Every tensor of this process that was not there `before`, by the first purpose that claims its memory."""
    there = {address: size for address, size in storages(_all_tensors()).items() if address not in before}
    claims = _claims(engine)
    out = dict.fromkeys([*claims, "other"], 0)
    for address, size in there.items():
        out[next((purpose for purpose, claimed in claims.items() if address in claimed), "other")] += size
    return out


def _claims(engine: Any) -> dict[str, Storages]:
    deepspeed, parameters = engine._engine, list(engine.module.parameters())
    optimizer = deepspeed.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    sharded = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    masters = [
        *_tensors(getattr(optimizer, "fp32_groups", [])),
        *_tensors(getattr(optimizer, "fp32_groups_flat_partition", [])),
        *_tensors(getattr(optimizer, "single_partition_of_fp32_groups", [])),
        *_tensors(getattr(optimizer, "fp32_partitioned_groups_flat", [])),
    ]
    gradients = [
        *(p.grad for p in [*parameters, *masters] if p.grad is not None),
        *_tensors([getattr(p, "grad_accum", None) for p in parameters]),
        *_tensors(getattr(optimizer, "averaged_gradients", {})),
        *_tensors(getattr(optimizer, "fp32_groups_gradients_flat", [])),
        *_tensors(getattr(optimizer, "grad_partitions_flat_buffer", None)),
        *_tensors(getattr(optimizer, "accumulated_grads_in_cpu", {})),
    ]
    buffers = [
        *(tensor for bucket in getattr(optimizer, "ipg_buckets", {}).values() for tensor in _tensors(bucket.buffer)),
        *_tensors(getattr(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", [])),
        *_tensors(getattr(optimizer, "temp_grad_buffer_for_cpu_offload", None)),
        *_tensors(getattr(optimizer, "temp_grad_buffer_for_gpu_offload", None)),
    ]
    average = engine.average.shards if engine.average is not None else {}
    return {
        "parameters": storages(sharded or [p.data for p in parameters]),
        "persistent": storages(p.data for p in parameters),
        "gradients": storages(gradients),
        "optimizer": storages([*masters, *_tensors(dict(inner.state))]),
        "buffers": storages(buffers),
        "average": storages(average.values()),
    }


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Of nested lists and mappings."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def storages(tensors: Iterable[torch.Tensor]) -> Storages:
    """Memory of tensors, each piece once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and tensor.device.type != "meta":
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _all_tensors() -> Iterator[torch.Tensor]:
    gc.collect()
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # `isinstance` would ask proxies for their class
            yield thing
            if thing.is_leaf and thing.grad is not None:
                yield thing.grad
