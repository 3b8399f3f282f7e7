"""Where models live and how the trained ones are sharded and optimized."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo, model_validator
from pydantic_core import CoreSchema, core_schema
from typing_extensions import Self

from rlhf_dist.config.base import (
    AbsolutePath,
    Count,
    Decides,
    Fraction,
    ModelPath,
    NonNegative,
    Positive,
    PositiveInt,
    Result,
    Schema,
)
from rlhf_dist.config.deepspeed_identity import ds_numerics
from rlhf_dist.config.freeze import FreezeConfig, LoRAConfig
from rlhf_dist.config.secret_names import is_secret

Precision = Literal["fp32", "bf16", "fp16"]
PlacementStrategy = Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"]


class RayConfig(Schema):
    """How the driver reaches Ray."""

    address: str | None = None
    """`null` starts a private Ray on this machine; `auto` joins the cluster that submitted this job; or a head address."""
    placement_timeout_s: Positive = 120.0
    """Longest wait for the cluster to grant the placement before the run is rejected."""
    network_interface: str | None = None
    """Interface of the ranks' collectives (NCCL, gloo), such as `eth0`, which every node must have. It comes before
    NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME; null leaves it to these variables, and where they are not set takes, on each
    node, the one with the address by which Ray knows the node."""
    env_vars: dict[str, str] = Field(default_factory=dict)
    """Environment variables of all rank processes, there from their start. They are stored in plain text in config.yaml and in
    logs of Ray that every user of a node can read: secrets belong into the driver's environment, and their
    names into `pass_env`."""
    pass_env: tuple[str, ...] = (
        "HF_*",
        "TRANSFORMERS_*",
        "TOKENIZERS_*",
        "NCCL_*",
        "GLOO_*",
        "TORCH_*",
        "PYTORCH_*",
        "VLLM_*",
    )
    """Patterns (`*`, `?`) of variables that rank processes on a cluster take over from the driver's environment, before they
    import torch or transformers. They go from process to process and are written nowhere. What a process reads at its very
    start, such as LD_LIBRARY_PATH, belongs into `env_vars`."""

    @model_validator(mode="after")
    def _no_secrets(self) -> RayConfig:
        if names := [name for name in self.env_vars if is_secret(name)]:
            raise ValueError(
                f"env_vars sets {', '.join(names)}, by the name a secret, which would be stored in plain text in "
                "config.yaml and in Ray's logs on the nodes; set it in the driver's environment, and name it in pass_env"
            )
        return self

    @model_validator(mode="after")
    def _one_interface(self) -> RayConfig:
        for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            if self.network_interface is not None and variable in self.env_vars:
                raise ValueError(
                    f"network_interface is {self.network_interface!r} and env_vars sets {variable} "
                    f"{self.env_vars[variable]!r}; keep one of them"
                )
        return self


class Placement(Schema):
    """The processes a role gets."""

    num_ranks: PositiveInt = 1
    """Processes (ranks) of this role under `cluster: ray`. `cluster: inline` always hosts one rank in this process."""
    gpus_per_rank: float = Field(default=1.0, gt=0, le=1)
    """Share of a GPU a rank gets when the device is cuda. 1: its own GPU. Below 1: the roles of
    that kind share as many GPUs as the largest of them has ranks. A role has one rank on each of the first `num_ranks` of
    these; where they lie on one node, rank i is on the i-th, else ranks are numbered node by node."""
    cpus_per_rank: Positive = 1.0
    """CPUs reserved for a rank on a Ray cluster."""
    threads_per_rank: PositiveInt = 1
    """CPU threads torch may use in a rank."""
    placement_strategy: PlacementStrategy = "PACK"
    """How the ranks of this role lie on the nodes of a cluster, in Ray's words: `PACK` on as few as possible, together with the
    other roles; `STRICT_PACK` on one, or the run is rejected; `SPREAD` on as many as possible; `STRICT_SPREAD` each on another.
    Roles that share GPUs must agree. Engines of several ranks are laid out as a rank is: each lies on one node."""

    @property
    def ranks_together(self) -> int:
        """Neighboring ranks that must lie on one node."""
        return 1


class OptimizerConfig(Schema):
    """AdamW with a learning-rate schedule."""

    learning_rate: Positive = 1e-5
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment."""
    eps: Positive = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay; not applied to biases, norms and other 1-D parameters."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after warm-up; `linear` and `cosine` end at 0."""
    warmup_fraction: Fraction = 0.03
    """Share of all optimizer steps spent warming up linearly from 0."""
    max_grad_norm: NonNegative = 1.0
    """Global gradient-norm clip; 0 switches clipping off."""


class ModelHost(Placement):
    """A hosted model."""

    model_path: Result[ModelPath]
    """A directory in Hugging Face format or a hub name."""
    precision: Result[Precision] = "bf16"
    """Compute precision. Trained models keep fp32 master weights in any case. `fp16` is for GPUs without bf16 (V100, T4):
    numbers above 65,504 overflow, and gradients are scaled so that small ones do not vanish."""
    micro_batch_size: PositiveInt = 8
    """Records in one forward pass of one rank. A record is one sequence; in reward modeling it is a ranking, and its K
    responses are K sequences of the pass (a pair: 2), so bound memory by `micro_batch_tokens` where K varies. Changes memory
    and speed, never the result."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens in one forward pass of one rank, in place of `micro_batch_size`: sequences x longest sequence, or, when `packed`,
    the sum of their lengths. No less than `data.max_length_tokens` (in reward modeling, times the responses of a prompt,
    which share a pass: 2 for pairs). Changes memory and speed, never the result."""
    packed: bool = False
    """Forward passes without padding: a micro-batch's sequences lie end to end in one row, and attention stays within each.
    Changes memory and speed, never the result; a model that cannot keep packed sequences apart is rejected at the start. Where
    the model runs without flash attention, the mask alone holds (tokens in the pass)^2 entries: bound it by
    `micro_batch_tokens`."""


class FrozenModel(ModelHost):
    """A model that is only run."""

    zero_stage: Literal[0, 3] = 0
    """3 shards the parameters over this role's ranks; 0 holds a whole copy in each."""


class TrainedModel(ModelHost):
    """A model that is trained under DeepSpeed ZeRO."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO shards over this role's ranks: 1 optimizer states, 2 and gradients, 3 and parameters."""
    ds_config_path: Annotated[AbsolutePath | None, Decides(by=ds_numerics)] = None
    """A DeepSpeed JSON (see ds_configs/) whose sections replace the generated ones. Its ZeRO stage must equal `zero_stage`; the
    precision is `precision`, which the file may only repeat."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    resize_embeddings: Result[bool] = False
    """Give the model rows for the tokens that its tokenizer has beyond its embeddings, each the mean of all rows. In `sft` and
    `reward`; what they save has them. With `lora`, embeddings and head are trained whole, beside the adapters."""
    optimizer: Result[OptimizerConfig] = OptimizerConfig()
    freeze: Result[FreezeConfig] = FreezeConfig()
    lora: Result[LoRAConfig | None] = None
    """Train low-rank adapters in place of the model's own weights; null trains these. What is saved as `model/` has the
    adapters merged into its matrices; beside it, `adapter/` holds them alone, in peft's format."""

    @model_validator(mode="after")
    def _new_rows_are_trained(self) -> TrainedModel:
        if self.resize_embeddings and self.freeze.embeddings:
            raise ValueError(
                "resize_embeddings is true and freeze.embeddings is true, which would leave the rows of the new tokens "
                "untrained, all of them equal; set one of the two to false"
            )
        return self

    @model_validator(mode="after")
    def _adapters_freeze_already(self) -> TrainedModel:
        if self.lora is not None and self.freeze.any:
            raise ValueError(
                "lora is set, which freezes all of the model but the adapters (and a scalar head), and so is freeze; remove "
                "one of the two (to adapt some layers only, name them in lora.target_modules)"
            )
        return self


@dataclass(frozen=True)
class OptionalPath:
    """Annotates a model whose `model_path` may be absent or null: `Annotated[TrainedModel, OptionalPath("reward")]`.

    Args:
        role: field before this one whose `model_path` is the default; None where the default is filled in before validation.
    """

    role: str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_before_validator_function(self._filled, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = copy.deepcopy(handler.resolve_ref_schema(handler(schema)))
        found["required"] = [name for name in found.get("required", ()) if name != "model_path"]
        path = found["properties"]["model_path"]
        path["anyOf"] = [{"type": path.pop("type")}, {"type": "null"}]
        return found

    def _filled(self, given: Any, info: ValidationInfo) -> Any:
        if self.role is None or not isinstance(given, Mapping) or given.get("model_path") is not None:
            return given
        source = info.data.get(self.role)  # absent where it is invalid itself, which is an error already
        return {**given, "model_path": self.role if source is None else source.model_path}


DEFAULT_MODEL: Any = {}
"""Default of a field with an `OptionalPath`: all settings by default."""


class CheckpointConfig(Schema):
    """When checkpoints are written, and how many stay."""

    every_steps: Count = 0
    """Write a checkpoint every so many steps (PPO: iterations); 0: not by steps."""
    every_minutes: NonNegative = 15.0
    """Write a checkpoint after the first step that ends so long after the last one; 0: not by time."""
    at_end: bool = True
    """Write a checkpoint after the last step, from which the run can be extended."""
    keep_last: PositiveInt = 2
    """How many of the newest checkpoints stay."""


class TrackingConfig(Schema):
    """Where metrics go besides `metrics.jsonl`."""

    tensorboard: bool = False
    """Write TensorBoard event files to the run folder."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases. Without a network `online` falls back to offline with a warning; it never stops a run."""
    wandb_project: str = "rlhf_dist"
    """Weights & Biases project."""
    wandb_entity: str | None = None
    """Weights & Biases team or user."""
    num_samples: Count = 4
    """Generated samples written to `samples/` at each evaluation or iteration."""


class Hosting(Schema):
    """What runs and pipelines share."""

    run_dir: AbsolutePath
    """Folder of this run, on storage that every node sees. An existing run is never overwritten unless told so. `{seed}` in it
    becomes the run's seed, for several seeds of one configuration."""
    seed: Result[Count] = 0
    """Seed of every random draw of the run."""
    cluster: Literal["ray", "inline"] = "ray"
    """`ray` hosts models in Ray actors; `inline` in this process, one rank each (for a debugger)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses GPUs where there are any."""
    ray: RayConfig = RayConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _variables_have_processes(self) -> Self:
        if self.cluster == "inline" and self.ray.env_vars:
            raise ValueError(
                f"ray.env_vars sets {', '.join(self.ray.env_vars)} in rank processes, and cluster: inline has none; "
                "set them in the shell and remove ray.env_vars, or use cluster: ray"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_folder_a_seed(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "{seed}" in str(values.get("run_dir", "")):
            return {**values, "run_dir": str(values["run_dir"]).replace("{seed}", str(values.get("seed", 0)))}
        return values


class HostedRun(Hosting):
    """What the runs of all commands share."""

    overwrite: bool = False
    """Remove what an earlier run left in `run_dir`."""


class RunConfig(HostedRun):
    """A run that trains: it has checkpoints, and can be resumed from them."""

    resume: Literal["no", "auto"] = "no"
    """`auto` continues from the newest whole checkpoint in `run_dir`, or starts anew when there is none."""
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _one_way_to_treat_an_old_run(self) -> RunConfig:
        if self.overwrite and self.resume == "auto":
            raise ValueError(
                "overwrite is true and resume is auto: an old run is either removed or continued; keep one of them"
            )
        return self
