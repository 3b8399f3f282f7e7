"""What decides a run's result, by the marks on the fields of its configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from rlhf_dist.config.base import Decides
from rlhf_dist.config.data_set import DataSet
from rlhf_dist.config.deepspeed_identity import ds_checkpoint_format, ds_numerics
from rlhf_dist.evaluation.config import EvalConfig
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.run.identity import identity, resumed_identity, run_length
from rlhf_dist.run.launch import checkpoints
from rlhf_dist.run.prepared import Prepared
from rlhf_dist.sft.config import SFTConfig

FREE = {
    # Where and how a run is hosted.
    *("Hosting.run_dir", "Hosting.cluster", "Hosting.device", "HostedRun.overwrite", "RunConfig.resume"),
    *("RayConfig.address", "RayConfig.placement_timeout_s", "RayConfig.network_interface"),
    *("RayConfig.env_vars", "RayConfig.pass_env"),
    *("Placement.num_ranks", "Placement.gpus_per_rank", "Placement.cpus_per_rank", "Placement.threads_per_rank"),
    "Placement.placement_strategy",
    # Memory and speed.
    *("ModelHost.micro_batch_size", "ModelHost.micro_batch_tokens", "ModelHost.packed", "RolloutConfig.batch_size"),
    *("RolloutConfig.tensor_parallel_size", "RolloutConfig.num_chunks", "RolloutConfig.max_restarts"),
    *("RolloutConfig.vllm_options", "RolloutConfig.weight_transport"),
    "PPOStage.colocate",
    *("FrozenModel.zero_stage", "TrainedModel.zero_stage", "TrainedModel.gradient_checkpointing"),
    # What is written down, measured and checked on the way.
    *("CheckpointConfig.every_steps", "CheckpointConfig.every_minutes"),
    *("CheckpointConfig.at_end", "CheckpointConfig.keep_last"),
    *("TrackingConfig.tensorboard", "TrackingConfig.wandb", "TrackingConfig.wandb_project"),
    *("TrackingConfig.wandb_entity", "TrackingConfig.num_samples"),
    *("SupervisedSettings.eval_every_steps", "RewardSettings.bag_of_words_baseline"),
    *("PPOSettings.eval_every_iterations", "PPOSettings.ptx_ratio_every_iterations", "PPOSettings.self_checks"),
    "DataSet.name",
}
"""Class and field of what may change when a run resumes. A new field is marked (`Result`, `DataContent`, `RunLength`), or is
entered here."""


def unmarked(schema: type[BaseModel]) -> Iterator[str]:
    """The fields that no mark covers, each under the class that defines it."""
    for name, info in schema.model_fields.items():
        if any(isinstance(found, Decides) for found in info.metadata):
            continue
        nested = [part for part in parts_of(info.annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
        for part in nested:
            yield from unmarked(part)
        if not nested:
            owner = next(base for base in reversed(schema.__mro__) if name in getattr(base, "__annotations__", {}))
            yield f"{owner.__name__}.{name}"


def parts_of(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; a type by itself."""
    return get_args(annotation) if get_origin(annotation) is Union or "|" in str(annotation) else (annotation,)


def test_every_field_decides_or_may_change():
    found = {name for schema in (SFTConfig, RewardConfig, PPOConfig, EvalConfig, DataSet) for name in unmarked(schema)}
    assert found == FREE


def ppo_config(run_dir: Path, **ppo: Any) -> PPOConfig:
    return PPOConfig.model_validate(
        {
            "run_dir": run_dir,
            "policy": {"model_path": "lm"},
            "reward": {"model_path": "rm"},
            "data": {"prompts": [{"path": "p.jsonl", "kind": "prompt"}], "max_length_tokens": 256},
            "ppo": ppo,
        }
    )


def differing(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def test_a_check_that_stopped_a_run_may_be_switched_off_on_resume(tmp_path: Path):
    assert identity(ppo_config(tmp_path, self_checks=False), {}) == identity(ppo_config(tmp_path), {})


def test_what_changes_the_numbers_may_not_change(tmp_path: Path):
    changed = ppo_config(tmp_path, adaptive_kl_target=6.0, ema_decay=0.9)
    assert differing(identity(changed, {}), identity(ppo_config(tmp_path), {})) == {
        "ppo.adaptive_kl_target",
        "ppo.ema_decay",
    }


def test_the_length_belongs_to_a_key_and_not_to_a_checkpoint(tmp_path: Path):
    short, long = ppo_config(tmp_path), ppo_config(tmp_path, num_iterations=300)
    assert differing(identity(short, {}), identity(long, {})) == {"ppo.num_iterations"}
    assert resumed_identity(short, {}, {}) == resumed_identity(long, {}, {})
    assert run_length(long) == {"ppo.num_iterations": 300}


def test_content_counts_in_place_of_a_path(tmp_path: Path):
    found = identity(ppo_config(tmp_path), {"lm": "tree:1", "p.jsonl": "sha256:2"})
    assert (found["policy.model_path"], found["data.prompts.0.path"]) == ("tree:1", "sha256:2")
    resumed = resumed_identity(ppo_config(tmp_path), {}, {"prompts": "3"})
    assert not [key for key in resumed if key.startswith("data.prompts")], "the tokens that were read count instead"
    assert resumed["content of data: prompts"] == "3"


def test_a_deepspeed_file_counts_by_what_changes_numbers(tmp_path: Path):
    path = tmp_path / "ds.json"

    def written(**config: Any) -> Path:
        path.write_text(json.dumps(config), encoding="utf-8")
        return path

    offloaded = {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}}
    assert ds_numerics(written(zero_optimization=offloaded, steps_per_print=9)) is None
    assert ds_checkpoint_format(path) == {"offload_optimizer": "cpu"}
    ordered = {"stage": 2, "round_robin_gradients": True, "sub_group_size": 100, "overlap_comm": True}
    assert ds_numerics(written(zero_optimization=ordered)) is None
    assert ds_checkpoint_format(path) == {"round_robin_gradients": True, "sub_group_size": 100}
    found = ds_numerics(written(zero_optimization={"zero_quantized_weights": True}, communication_data_type="fp16"))
    assert found == {"zero_quantized_weights": True, "communication_data_type": "fp16"}
    assert ds_numerics(None) is ds_numerics(tmp_path / "absent.json") is None


def test_the_form_of_a_checkpoint_is_told_apart_from_what_decides(tmp_path: Path):
    record = checkpoints(ppo_config(tmp_path), Prepared([], None, {}, num_steps=7)).record
    assert record.checkpoint_format == {
        "policy.num_ranks": 1,
        "policy.zero_stage": 2,
        "value.num_ranks": 1,
        "value.zero_stage": 2,
    }
    assert not differing(dict(record.identity), resumed_identity(ppo_config(tmp_path), {}, {}))
    assert (record.num_steps, set(record.schedules)) == (7, {"policy", "value"})
