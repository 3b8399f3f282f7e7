"""How long a rollout engine generates: batch by batch with transformers, continuously with vLLM."""

from __future__ import annotations

from rlhf_dist.models.architecture import ELEMENT_BYTES, architecture
from rlhf_dist.planning.engines import EngineRank
from rlhf_dist.planning.hardware import Cluster
from rlhf_dist.planning.rates import Lengths, Rates, Seconds
from rlhf_dist.planning.roles import Role, Work

PREFILL = "reading prompts"
WEIGHTS = "reading weights and KV cache for every token"
LAUNCHES = "launching each layer's kernels for every token"
STEPS = "scheduling and launching token steps"
ALL_REDUCES = "all-reduces between the GPUs of an engine"


def seconds(role: Role, work: Work, cluster: Cluster, rates: Rates, lengths: Lengths) -> Seconds:
    """Of a GPU of one engine with its share of an iteration's responses; empty of a role that does not generate."""
    if role.rollout is None:
        return {}
    generate = _continuous if role.rollout.engine == "vllm" else _in_batches
    return generate(role, work, cluster, rates, lengths)


def _in_batches(role: Role, work: Work, cluster: Cluster, rates: Rates, lengths: Lengths) -> Seconds:
    """An engine's batches one after the other, each to the end of its longest response."""
    assert role.rollout is not None
    model, size = architecture(role.model_path), ELEMENT_BYTES[role.precision]
    rows = max(1, -(-work.responses // role.num_engines))
    at_once = min(rows, role.rollout.batch_size)
    batches = -(-rows // at_once)
    steps = lengths.longest_response
    prefill = model.forward_flops(at_once, lengths.prompt, 1)
    # Ended responses leave the batch: on average as many are at work as the mean response is long.
    busy = at_once * min(1.0, lengths.response / steps)
    context = lengths.prompt + steps / 2
    read = size * (model.num_parameters + busy * context * model.kv_elements_per_token)
    flops = busy * (model.body_flops_per_token + model.head_flops_per_token)
    reading = read / rates.memory_bandwidth(cluster.gpu)
    reading = max(reading, flops / (cluster.gpu.flops * rates.forward_efficiency))
    launching = max(0.0, model.num_layers * rates.layer_launch_s - reading)
    return {
        PREFILL: batches * prefill / (cluster.gpu.flops * rates.forward_efficiency),
        WEIGHTS: batches * steps * reading,
        LAUNCHES: batches * steps * launching,
    }


def _continuous(role: Role, work: Work, cluster: Cluster, rates: Rates, lengths: Lengths) -> Seconds:
    """A sequence that ends makes room for the next one: as many as fit are always under way, until the last of them ends. The
    longest response may be the last to start."""
    engine = EngineRank.of(role, work)
    model, ranks = engine.model, role.tensor_parallel_size
    size = ELEMENT_BYTES[role.precision]
    fit = engine.asked_at_once if cluster.on_cpu else engine.fit_at_once(cluster.gpu_memory_bytes)
    at_once = max(1, min(engine.asked_at_once, fit))
    steps = engine.sequences * lengths.response / at_once
    last = max(0.0, lengths.longest_response - lengths.response)  # in which the others have ended

    def step(busy: float) -> tuple[float, float]:
        """(reading or computing, all-reduces) of one token of `busy` sequences, in seconds."""
        context = lengths.prompt + lengths.response / 2
        reading = (engine.weights + busy * context * engine.token) / rates.memory_bandwidth(cluster.gpu)
        flops = busy * (model.body_flops_per_token + model.head_flops_per_token) / ranks
        return max(reading, flops / (cluster.gpu.flops * rates.forward_efficiency)), reduced(busy, 1)

    def reduced(tokens: float, passes: float) -> float:
        """Seconds of the two all-reduces of each layer, a scatter and a gather each, of `tokens` in `passes`."""
        if ranks == 1:
            return 0.0
        moved = 2 * rates.ring_s(tokens * model.hidden_size * size, ranks, cluster.gpu.link_bytes_per_s)
        return 2 * model.num_layers * (moved + passes * rates.all_reduce_latency_s)

    prompts = engine.sequences * lengths.prompt
    prefill = model.forward_flops(engine.sequences, lengths.prompt, 1) / ranks
    (reading, reducing), (alone, reducing_alone) = step(at_once), step(1)
    return {
        PREFILL: prefill / (cluster.gpu.flops * rates.forward_efficiency),
        WEIGHTS: steps * reading + last * alone,
        ALL_REDUCES: steps * reducing + last * reducing_alone + reduced(prompts, prompts / engine.batched_tokens),
        STEPS: (steps + last) * rates.step_launch_s,
    }
