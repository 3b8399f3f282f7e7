"""How far the activations that `rlhf-dist plan` estimates are from those of real training passes.

    python tests/bench/plan_activations.py [--large]

Runs one forward and backward pass of the project's own modules (`models/forward.py`) a line, on the CPU, and prints a table:
what autograd really kept (saved tensors, each piece of memory once, parameters and buffers skipped), and the most that was
allocated at any moment of forward and backward pass, less the parameters' gradients; both beside the estimate.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from rlhf_dist.models.forward import ForwardPass, ScalarHead, TargetLogprobs, response_target_mask
from rlhf_dist.models.loading import DTYPES
from rlhf_dist.planning.activations import Activations, TrainingPass, kept_bytes, training_activations

SMALL: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL, num_attention_heads=8, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SMALL, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=1000, n_embd=128, n_layer=4, n_head=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "gpt_neox": GPTNeoXConfig(**SMALL, num_attention_heads=8),
    # SmolLM2-135M's sizes.
    "135M": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
}


@dataclass(frozen=True)
class Case:
    """A line of the table."""

    model: str
    rows: int
    length: int
    prompt: int
    """Tokens before the response; 0: every token but the first is a target."""
    precision: Any = "bf16"
    options: dict[str, bool] = field(default_factory=dict)
    """`packed`, `checkpointing`, `scalar`, `entropy`."""

    @property
    def words(self) -> str:
        """For the table."""
        return ", ".join(self.options) or "-"


CASES = [
    Case("llama", 4, 256, 128),
    Case("llama", 4, 256, 128, "fp32"),
    Case("llama", 4, 256, 0, options={"entropy": True}),
    Case("llama", 2, 256, 128, options={"entropy": True}),
    Case("llama", 4, 256, 128, options={"packed": True}),
    Case("llama", 4, 256, 128, options={"checkpointing": True}),
    Case("llama", 4, 256, 128, options={"scalar": True}),
    Case("llama", 4, 256, 128, options={"scalar": True, "checkpointing": True}),
    Case("qwen2", 4, 256, 128),
    Case("qwen2", 1, 512, 0, "fp32"),
    Case("gpt2", 4, 256, 128),
    Case("gpt2", 4, 256, 128, options={"checkpointing": True}),
    Case("gpt_neox", 4, 256, 128),
]
LARGE = [
    Case("135M", 2, 512, 256),
    Case("135M", 4, 512, 256, options={"entropy": True}),
    Case("135M", 4, 512, 256, options={"checkpointing": True, "entropy": True}),
    Case("135M", 4, 512, 256, options={"scalar": True}),
    Case("135M", 2, 512, 256, "fp32"),
    Case("135M", 4, 512, 256, options={"packed": True}),
    Case("135M", 4, 512, 256, options={"packed": True, "checkpointing": True}),
]


@dataclass(frozen=True)
class Measured:
    """Bytes of a real pass and its estimate."""

    kept: int
    peak: int
    estimate: Activations

    @property
    def deviation(self) -> float:
        """Of the real peak from the estimated one."""
        return self.peak / self.estimate.peak - 1


def measure(case: Case) -> Measured:
    """Run the case."""
    torch.manual_seed(0)
    scalar = case.options.get("scalar", False)
    config = MODELS[case.model]
    config.pad_token_id = 0
    auto_class: Any = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    options = {"num_labels": 1} if scalar else {}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        model = auto_class.from_config(type(config).from_pretrained(folder, **options), dtype=DTYPES[case.precision])
        estimate = training_activations(_as_planned(case, folder))
    model.train()
    if case.options.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    run = _pass_of(case, model, scalar)
    kept = kept_bytes(model, run)
    run().backward()  # allocates the gradients, which then stay
    return Measured(kept, _peak(lambda: run().backward()) - _largest_gradient(model), estimate)


def _as_planned(case: Case, folder: str) -> TrainingPass:
    return TrainingPass(
        model_path=folder,
        precision=case.precision,
        rows=case.rows,
        length=case.length,
        num_targets=case.rows * (case.length - (case.prompt or 1)),
        scalar=case.options.get("scalar", False),
        packed=case.options.get("packed", False),
        checkpointing=case.options.get("checkpointing", False),
        entropy=case.options.get("entropy", False),
    )


def _pass_of(case: Case, model: Any, scalar: bool) -> Any:
    """A forward pass to a number, over sequences as long as planned but for one token, so that there is padding."""
    module: ForwardPass = (ScalarHead if scalar else TargetLogprobs)(model, case.options.get("packed", False))
    module._unchecked = False  # the check of packing runs passes of its own
    tokens = torch.randint(3, 900, (case.rows, case.length))
    lengths = torch.full((case.rows,), case.length)
    lengths[-1] -= 1 if case.rows > 1 else 0
    prompts = torch.full((case.rows,), case.prompt or 1)
    targets = response_target_mask(prompts, lengths - prompts, case.length)

    def run() -> Any:
        if scalar:
            return module(tokens, lengths).sum()
        logprobs, entropies = module(tokens, lengths, targets, 1.0, case.options.get("entropy", False))
        return logprobs.sum() + (0.0 if entropies is None else entropies.sum())

    return run


def _largest_gradient(model: Any) -> int:
    """The gradient of a parameter exists twice for a moment: that is the parameters', not the activations'."""
    return max(p.numel() * p.element_size() for p in model.parameters())


def _peak(work: Any) -> int:
    """The most bytes that were allocated at a time during `work`, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def main(large: bool) -> None:
    """Print the table."""
    columns = "model | rows × tokens | targets from | precision | options | kept, MB | estimate | peak, MB | estimate | off by"
    print(f"| {columns} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case in CASES + (LARGE if large else []):
        m = measure(case)
        numbers = [m.kept, m.estimate.saved + m.estimate.logits, m.peak, m.estimate.peak]
        cells = " | ".join(f"{number / 1e6:.1f}" for number in numbers)
        shape = f"{case.rows} × {case.length} | {case.prompt or 1}"
        print(
            f"| {case.model} | {shape} | {case.precision} | {case.words} | {cells} | {m.deviation:+.0%} |", flush=True
        )


if __name__ == "__main__":
    main("--large" in sys.argv[1:])
