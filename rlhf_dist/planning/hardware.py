"""GPUs by their datasheets, and the machines they are in."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf_dist.core.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """A GPU. Rates are a datasheet's, without sparsity."""

    name: str
    memory_bytes: int
    """What a process can be given of it."""
    flops: float
    """bf16 (V100: fp16) operations a second of the matrix units."""
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """To the other GPUs of its node, one direction."""


def _gpu(name: str, gib: float, tflops: float, memory_gb: float, link_gb: float) -> GPU:
    return GPU(name, int(gib * GIB), tflops * 1e12, memory_gb * 1e9, link_gb * 1e9)


GPUS = {
    # Memory: the total that CUDA reports, a little below the name. NVLink: half of the datasheet's total of both directions.
    "b200": _gpu("B200 SXM 180GB", 166.0, 2250, 8000, 900),
    "h200": _gpu("H200 SXM 141GB", 139.8, 989, 4800, 450),
    "h100": _gpu("H100 SXM 80GB", 79.1, 989, 3350, 450),
    "h100-pcie": _gpu("H100 PCIe 80GB", 79.1, 756, 2000, 64),
    "a100-80gb": _gpu("A100 SXM 80GB", 79.1, 312, 2039, 300),
    "a100-40gb": _gpu("A100 SXM 40GB", 39.4, 312, 1555, 300),
    "l40s": _gpu("L40S 48GB", 44.4, 362, 864, 32),
    "a10g": _gpu("A10G 24GB", 22.0, 70, 600, 32),
    "v100-32gb": _gpu("V100 SXM2 32GB", 31.7, 125, 900, 150),
    # For --device cpu: round numbers, to be calibrated by --rates. Memory is the machine's, which processes share.
    "cpu": _gpu("CPU", 1 << 20, 0.1, 20, 5),
}
"""Name → GPU. Source: NVIDIA's datasheets of the products (NVLink 5: 1,800 GB/s in both directions together, NVLink 4: 900,
NVLink 3: 600, NVLink 2: 300; PCIe 5 ×16: 64 GB/s in one, PCIe 4 ×16: 32)."""

NODE_LINK_BYTES_PER_S = 50e9
"""Between nodes, a GPU's share in one direction: a 400 Gbit/s adapter for each, as in DGX H100 and its like."""

HOST_BYTES_PER_GPU = 250_000_000_000
"""Assumed of a node where nothing is said: 2 TB for eight GPUs, as DGX H100 and its like have."""


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    gpu: GPU
    gpus_per_node: int
    num_nodes: int
    gpu_memory_bytes: int
    host_memory_bytes: int | None = None
    """Of a node; None where it is not known, and then not checked."""
    host_memory_assumed: bool = False
    """Nobody said what a node has: `HOST_BYTES_PER_GPU`."""
    node_link_bytes_per_s: float = NODE_LINK_BYTES_PER_S

    @property
    def num_gpus(self) -> int:
        """In all."""
        return self.gpus_per_node * self.num_nodes

    @property
    def host_memory_source(self) -> str:
        """In words, where it is an assumption; else ""."""
        return f"assumed: {HOST_BYTES_PER_GPU / 1e9:g} GB a GPU, see --cpu-memory" if self.host_memory_assumed else ""

    @property
    def on_cpu(self) -> bool:
        """Whether there is no GPU at all, and models live in host memory."""
        return self.gpu.name == GPUS["cpu"].name


def parse_bytes(text: str, option: str) -> int:
    """`80GB` (10^9), `80GiB` (2^30).

    Raises:
        ConfigError: `text` is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"{option} is {text!r}; write a size such as 80GB (10^9 bytes) or 80GiB (2^30 bytes)")
    unit = match[2].lower()
    return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** ("kmgt".index(unit[0]) + 1))


def gpu_named(name: str, option: str) -> GPU:
    """A GPU of the table.

    Raises:
        ConfigError: there is none of that name.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise ConfigError(f"{option} is {name!r}; choose one of {', '.join(GPUS)}")
    return found
