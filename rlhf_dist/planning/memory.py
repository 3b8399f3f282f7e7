"""What one rank of a role holds, phase by phase: bytes on its GPU and in host memory, on disk and on the way.

Parameters, gradients, optimizer states and what DeepSpeed keeps for them are exact (`sharding`), activations are an estimate
with a measured error (`activations`). What comes and goes besides (buckets, gathered layers, AdamW's intermediate results)
follows the code that allocates it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_dist.distributed.deepspeed.saving import SHARD_BYTES
from rlhf_dist.distributed.weight_sync import BUCKET_BYTES
from rlhf_dist.models.architecture import ELEMENT_BYTES, Architecture
from rlhf_dist.planning.activations import TrainingPass, inference_bytes, training_activations
from rlhf_dist.planning.allowances import CONTEXT_BYTES, FRAGMENTATION, NCCL_BYTES, PROCESS_BYTES
from rlhf_dist.planning.engines import EngineRank
from rlhf_dist.planning.roles import Passes, Role, Work
from rlhf_dist.planning.sharding import Held, ModelStates, Sharding, average_bytes, frozen_states, held, largest_states

Items = dict[str, Held]
"""What the bytes are for → bytes of one rank."""


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of a role's rank; of rank 0 where ranks differ."""

    role: Role
    model: Architecture
    phases: dict[str, Items]
    """load, generate, score, update (backward passes), step (optimizer), sync, save → what is held then."""
    checkpoint_bytes: int
    """On disk, of all ranks, for one checkpoint."""
    model_bytes: int
    """On disk, of the model in Hugging Face format; what a weight sync sends."""
    engine: EngineRank | None = None
    """Of a rollout role whose engine is vLLM."""

    def total(self, phase: str) -> Held:
        """In a phase."""
        return sum(self.phases[phase].values(), Held())

    @property
    def worst_phase(self) -> str:
        """The one that takes the most of the GPU."""
        return max(self.phases, key=lambda phase: self.total(phase).gpu)

    @property
    def context_bytes(self) -> int:
        """Of a process that holds nothing: CUDA context, NCCL; of vLLM, CUDA graphs."""
        if self.engine is not None:
            return self.engine.allowance
        nccl = NCCL_BYTES if self.role.num_ranks > 1 and self.role.rollout is None else 0
        return CONTEXT_BYTES + nccl

    @property
    def allowance_bytes(self) -> int:
        """For what is not counted: `context_bytes`, and fragmentation."""
        return self.context_bytes + int(FRAGMENTATION * self.total(self.worst_phase).gpu)

    @property
    def gpu_bytes(self) -> int:
        """Of a rank's GPU. A process's allocator keeps what it once had, so that this is taken in all phases."""
        return self.total(self.worst_phase).gpu + self.allowance_bytes

    @property
    def host_bytes(self) -> int:
        """Of its node's memory, at the most."""
        return PROCESS_BYTES + max(self.total(phase).host for phase in self.phases)


def role_memory(role: Role, work: Work) -> RoleMemory:
    """Plan a role.

    Raises:
        ModelError: its model's config cannot be read or built.
        ConfigError: its model cannot be frozen or adapted as asked.
    """
    model = role.architecture
    size = ELEMENT_BYTES[role.precision]
    model_bytes = size * model.num_parameters
    if role.rollout is not None and role.rollout.engine == "vllm":
        engine = EngineRank.of(role, work)
        bucket = largest_bucket(model, role.precision, BUCKET_BYTES)
        return RoleMemory(role, model, engine.phases(bucket), 0, model_bytes, engine)
    if role.rollout is not None:
        return RoleMemory(role, model, _rollout(role, model, work), 0, model_bytes)
    if role.frozen is not None:
        return RoleMemory(role, model, _frozen(role, model), 0, model_bytes)
    sharding = _sharding(role)
    return RoleMemory(
        role, model, _trained(role, model, sharding, work), _checkpoint(role, model, sharding), model_bytes
    )


def _sharding(role: Role) -> Sharding:
    model = role.trained or role.frozen
    assert model is not None
    return Sharding.of(model, role.num_ranks)


def largest_bucket(model: Architecture, precision: str, bucket_bytes: int) -> int:
    """Bytes of the largest bucket of whole parameters (`engine.zero.parameter_buckets`: consecutive ones, at least one)."""
    size, most, now = ELEMENT_BYTES[precision], 0, 0
    for number in model.sizes:
        now = now + number * size if now + number * size <= bucket_bytes else number * size
        most = max(most, now)
    return most


def _rollout(role: Role, model: Architecture, work: Work) -> dict[str, Items]:
    config = role.rollout
    assert config is not None
    size = ELEMENT_BYTES[role.precision]
    weights: Items = {"parameters": held(size * model.num_parameters)}
    rows = min(config.batch_size, max(1, -(-work.responses // role.num_ranks)))
    cache = rows * (work.prompt + work.response) * model.kv_elements_per_token * size
    # A step makes each layer's cache anew, one token longer. Sampling holds log-probs in fp32 and their sums in float64.
    sampling = rows * model.vocab_size * (size + 2 * 4 + 3 * 8)
    prefill = inference_bytes(model, role.precision, rows, work.prompt, 0, False)
    generate = weights | {
        "KV cache": held(cache + cache // model.num_layers),
        "activations": held(prefill),
        "logits": held(sampling),
    }
    bucket = largest_bucket(model, role.precision, BUCKET_BYTES)
    load = weights | {"checkpoint": Held(0, size * model.num_parameters)}
    return {"load": load, "generate": generate, "sync": weights | {"sync bucket": Held(bucket, bucket)}}


def _frozen(role: Role, model: Architecture) -> dict[str, Items]:
    sharding, size = _sharding(role), ELEMENT_BYTES[role.precision]
    states = frozen_states(model, sharding)
    rest = _resting(states)
    load: Items = {**rest, "checkpoint": Held(0, size * model.num_parameters)}
    if sharding.zero_stage == 3:
        load["gathered parameters"] = held(size * max(model.sizes))
    score: Items = {**rest, **_gathered(model, sharding), **_forward(role, model)}
    return {"load": load, "score": score}


def _resting(states: ModelStates) -> Items:
    items = {
        "parameters": states.parameters + states.persistent,
        "gradients": states.gradients_kept,
        "optimizer": states.optimizer,
        "buffers": states.buffers,
    }
    return {name: size for name, size in items.items() if size.total}


def _gathered(model: Architecture, sharding: Sharding) -> Items:
    """What ZeRO-3 holds whole while layers are at work, up to its own limits."""
    if sharding.zero_stage < 3 or (sharding.num_ranks == 1 and not sharding.offload_param):
        return {}
    sizes = [*model.frozen_sizes, *(size for group in model.groups for size in group)]
    large = sum(size for size in sizes if size > sharding.persistence_threshold)
    limit = max(sharding.max_live_parameters, max(sizes)) + sharding.prefetch_bucket_size
    return {"gathered parameters": held(sharding.element_bytes * min(large, limit))}


def _forward(role: Role, model: Architecture) -> Items:
    """Scoring a micro-batch."""
    passes, host = role.score, role.trained or role.frozen
    if passes is None or host is None:
        return {}
    rows = role.micro_sequences(passes)
    whole = inference_bytes(model, role.precision, rows, passes.length, rows * passes.targets, host.packed)
    body = inference_bytes(model, role.precision, rows, passes.length, 0, host.packed)
    return {"activations": held(min(body, whole)), "logits": held(max(0, whole - body))}


def _trained(role: Role, model: Architecture, sharding: Sharding, work: Work) -> dict[str, Items]:
    size, states = sharding.element_bytes, largest_states(model, sharding)
    rest = _resting(states)
    if role.average:
        rest["average"] = average_bytes(model, sharding)
    gathered = _gathered(model, sharding)
    phases: dict[str, Items] = {"load": _loading(rest, model, sharding)}
    if role.score is not None:
        phases["score"] = {**rest, **gathered, **_forward(role, model)}
    update: Items = {**rest, **gathered, "gradients": states.gradients}
    update["buffers"] = update.get("buffers", Held()) + held(_reducing(role, model, sharding, states))
    update |= _backward(role)
    phases["update"] = update
    phases["step"] = {**rest, "gradients": states.gradients, "AdamW's intermediate": _stepping(model, sharding)}
    whole = largest_bucket(model, role.precision, SHARD_BYTES)
    in_parts = sharding.zero_stage == 3 or role.average
    phases["save"] = {
        **rest,
        "gathered parameters": Held(whole if in_parts else 0, whole if in_parts else size * model.num_parameters),
    }
    if role.name == "policy":
        bucket = largest_bucket(model, role.precision, BUCKET_BYTES)
        # Gathered on every rank; copied to host memory and into the object store by rank 0.
        on_gpu = bucket if sharding.zero_stage == 3 else 0
        phases["sync"] = {**rest, "sync bucket": Held(on_gpu, 2 * bucket)}
    return phases


def _loading(rest: Items, model: Architecture, sharding: Sharding) -> Items:
    """transformers reads the checkpoint on the CPU; DeepSpeed then makes its own flat copies, and zero gradients once."""
    size, checkpoint = sharding.element_bytes, Held(0, sharding.element_bytes * model.num_parameters)
    if sharding.zero_stage == 3:
        twice = 0 if sharding.offload_param else size * sum(sharding.shard(number) for number in model.sizes)
    else:
        twice = size * model.num_trained if sharding.zero_stage else 0
    # Moments come with the first step only.
    optimizer = Held(rest["optimizer"].gpu // 3, rest["optimizer"].host // 3)
    return {**rest, "optimizer": optimizer, "checkpoint": checkpoint, "second copy": held(twice)}


def _backward(role: Role) -> Items:
    """The largest of an optimizer step's micro-batches."""
    host = role.trained
    assert host is not None
    found = [training_activations(_training_pass(role, passes)) for passes in role.update]
    most = max(found, key=lambda a: a.peak)
    return {"activations": held(most.saved + max(0, most.peak - most.saved - most.logits)), "logits": held(most.logits)}


def _training_pass(role: Role, passes: Passes) -> TrainingPass:
    host = role.trained
    assert host is not None
    rows = role.micro_sequences(passes)
    return TrainingPass(
        model_path=role.model_path,
        scalar=role.scalar,
        precision=role.precision,
        rows=rows,
        length=passes.length,
        num_targets=rows * passes.targets,
        packed=host.packed,
        checkpointing=host.gradient_checkpointing,
        entropy=passes.entropy,
        freeze=host.freeze,
        lora=host.lora,
    )


def _reducing(role: Role, model: Architecture, sharding: Sharding, states: ModelStates) -> int:
    """On the GPU during backward passes: gradients on their way, and buckets that exist only then."""
    size, count, stage = sharding.element_bytes, model.num_trained, sharding.zero_stage
    bucket = min(sharding.reduce_bucket_size, count)
    if stage == 0 or sharding.keeps_fp32_gradients:
        several = role.num_ranks > 1
        return (4 if stage else size) * bucket * several  # flattened to be reduced
    fresh = size * max(map(max, model.groups))
    if stage == 3:
        return fresh
    # The bucket is allocated whole, however small the model; what is reduced of it is flattened once more.
    flattened = bucket if role.num_ranks > 1 else 0
    if sharding.accumulates_whole:
        buckets = 0 if role.num_ranks > 1 else sharding.bucket_elements  # (of several ranks: among the gradients)
        return 4 * (count + buckets + flattened) + fresh
    again = 0
    if size == 4 and any(role.num_micro_batches(passes) > 1 or len(role.update) > 1 for passes in role.update):
        again = states.gradients.gpu  # each micro-batch's are added to those before
    return size * (sharding.bucket_elements + flattened) + fresh + again


def _stepping(model: Architecture, sharding: Sharding) -> Held:
    """AdamW holds one intermediate result as large as what it updates; DeepSpeed copies gradients in some cases before."""
    size, stage, on_host = sharding.element_bytes, sharding.zero_stage, sharding.offload_optimizer
    largest = max(map(sum, model.groups))
    if stage == 0:
        return held(4 * largest + (4 * model.num_trained if size < 4 else 0))
    if stage == 3:
        part = min(sum(sharding.shard(number) for number in max(model.groups, key=sum)), sharding.sub_group_size)
        return held(4 * part * (1 if on_host else 2), on_host)
    part = max(sharding.padded(group) for group in model.groups) // sharding.num_ranks
    return held(4 * part * (2 if size == 4 else 1), on_host)


def _checkpoint(role: Role, model: Architecture, sharding: Sharding) -> int:
    """Master weights and moments of all ranks; below ZeRO-3 the weights as well; from ZeRO-2 on what is frozen once
    more; the average."""
    stage, size = sharding.zero_stage, sharding.element_bytes
    weights = size * model.num_held if stage < 3 else 0
    weights += size * sum(model.frozen_sizes) if stage >= 2 else 0
    states = (8 if stage == 0 and size == 4 else 12) * model.num_trained
    return weights + states + (4 * model.num_parameters if role.average else 0)
