"""One process group for the ranks of a role."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class RankContext:
    """Where a hosted model is: its rank among the processes of its role."""

    rank: int = 0
    world_size: int = 1
    master_address: str = "127.0.0.1"
    master_port: int = 0
    """0: no rendezvous; only for a world of one."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    threads: int = 1
    """CPU threads of torch."""
    seed: int = 0
    """The run's seed."""
    interface: str | None = None
    """Network interface of collectives, as configured; it comes before what the environment says."""
    own_interface: str | None = None
    """The one with this node's address, where neither `interface` nor the environment names one; None leaves the choice to NCCL
    and gloo."""


def prepare_process(context: RankContext) -> None:
    """Threads, device, and the environment that must stand before DeepSpeed is imported for the first time."""
    os.environ["DS_ACCELERATOR"] = context.device
    # Read by DeepSpeed and transformers. A rank sees only its own GPU, so its local rank is 0.
    os.environ.update(RANK=str(context.rank), WORLD_SIZE=str(context.world_size), LOCAL_RANK="0")
    os.environ["MASTER_ADDR"] = context.master_address
    os.environ["MASTER_PORT"] = str(context.master_port or free_port())
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if context.interface is not None:
            os.environ[variable] = context.interface
        elif context.own_interface is not None:
            # They would guess: NCCL by name, gloo by what the hostname resolves to, which is often a loopback address.
            os.environ.setdefault(variable, context.own_interface)
    torch.set_num_threads(context.threads)
    if context.device == "cuda":
        torch.cuda.set_device(0)


_rendezvous: Any = None
"""The store that this process, rank 0, has opened for the other ranks."""


def open_rendezvous() -> int:
    """Listen for the ranks of a role on a port that the system chooses, and return it: nobody else can take it between its
    choice and its use. A process that has opened one keeps it."""
    global _rendezvous
    if _rendezvous is None:
        _rendezvous = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)  # pyright: ignore
    return _rendezvous.port


def join_process_group(context: RankContext, timeout_s: float = 1800) -> None:
    """Join (or, for a world of one, create) the default process group of a role whose ranks share a model. Does nothing
    where this process has one."""
    if dist.is_initialized():
        return
    backend = "nccl" if context.device == "cuda" else "gloo"
    if context.world_size == 1:
        # A world of one meets nobody: an in-memory store needs no port and no network.
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        timeout = timedelta(seconds=timeout_s)
        store = _role_store(context, timeout)
        dist.init_process_group(backend, store=store, rank=context.rank, world_size=context.world_size, timeout=timeout)
    # Here and not at the top: DeepSpeed reads DS_ACCELERATOR when it is imported, and a driver never needs it at all.
    import deepspeed

    # DeepSpeed would compile a shared-memory all-reduce with the C++ compiler of this machine (if it has one) at the first
    # start. It serves tensor-parallel inference only, which nothing here uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)


def join_part(context: RankContext, size: int, timeout_s: float = 1800) -> None:
    """Join a default process group of `size` neighboring ranks of a role, this one among them, and have the environment say so:
    for engines that several ranks of a role make up."""
    part, rank = divmod(context.rank, size)
    timeout = timedelta(seconds=timeout_s)
    store = dist.PrefixStore(f"part {part}", _role_store(context, timeout))  # pyright: ignore[reportPrivateImportUsage]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    backend = "nccl" if context.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _role_store(context: RankContext, timeout: timedelta) -> Any:
    """The store at which the ranks of a role meet."""
    if _rendezvous is not None and _rendezvous.port == context.master_port:
        return _rendezvous
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        context.master_address,
        context.master_port,
        context.world_size,
        is_master=context.rank == 0,
        timeout=timeout,
        wait_for_workers=False,
    )


def barrier() -> None:
    """Wait for every rank of the role."""
    if dist.get_world_size() > 1:
        dist.barrier()


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank when `flag` is true on one."""
    if dist.get_world_size() == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def my_rank() -> int:
    """This process's rank in the role."""
    return dist.get_rank()


def num_ranks() -> int:
    """Ranks of the role."""
    return dist.get_world_size()


def largest(value: int, device: torch.device) -> int:
    """The largest value of any rank, on every rank."""
    if dist.get_world_size() == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def summed(value: Tensor) -> Tensor:
    """The elementwise sum over the ranks of the role; changes `value`."""
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def gathered_shards(shard: Tensor) -> Tensor:
    """[n] of every rank, one after the other in rank order: [ranks · n]."""
    if dist.get_world_size() == 1:
        return shard
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, shard.contiguous())
    return torch.cat(parts)


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
