"""Bytes that processes hold besides what is counted. Assumptions: nothing here was measured on a GPU."""

CONTEXT_BYTES = 600_000_000
"""CUDA context and kernels of a process."""
NCCL_BYTES = 600_000_000
"""NCCL's buffers of a process that talks to others of its role."""
GRAPH_BYTES = 2_000_000_000
"""CUDA graphs of a rank of vLLM (its log warns of 1 to 3 GiB); none with `enforce_eager`."""
FRAGMENTATION = 0.05
"""Share of a process's peak that its allocator holds besides, in pieces nobody fits into."""
PROCESS_BYTES = 1_500_000_000
"""Host memory of a rank's process before it holds anything: Python, torch, DeepSpeed, Ray."""
