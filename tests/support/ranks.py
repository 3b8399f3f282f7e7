"""The ranks of one role as processes of their own, without Ray: for what a process can do only once."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from rlhf_dist.distributed.deepspeed.process_group import RankContext, free_port, prepare_process


def run_ranks(
    num_ranks: int, function: Callable[..., Any], folder: Path, *args: Any, timeout_s: float = 240
) -> list[Any]:
    """`function(context, *args)` on every rank at once; its results in rank order. They pass through `folder`.

    `function` is one of a module's, so that a new process can import it.

    Raises:
        AssertionError: a rank failed, or did not end in time; with what the first of them said.
    """
    spawn = multiprocessing.get_context("spawn")
    port = free_port()
    contexts = [RankContext(rank, num_ranks, "127.0.0.1", port) for rank in range(num_ranks)]
    processes = [spawn.Process(target=_run, args=(context, function, folder, args, sys.path)) for context in contexts]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout_s)
        errors = sorted(folder.glob("*.error"))
        assert not errors, errors[0].read_text(encoding="utf-8")
        assert [process.exitcode for process in processes] == [0] * num_ranks
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(num_ranks)]


def _run(
    context: RankContext, function: Callable[..., Any], folder: Path, args: tuple[Any, ...], path: list[str]
) -> None:
    sys.path[:] = path
    prepare_process(context)
    try:
        torch.save(function(context, *args), folder / f"{context.rank}.result")
    except BaseException:
        (folder / f"{context.rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        raise
