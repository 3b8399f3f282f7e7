"""A whole plan: roles and batches as a run has them, what shares a GPU, times, suggestions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import hosted, prompt_batch, save_tiny_lm, token_batch, trained, worker_of
from transformers import AutoModelForCausalLM, DynamicCache

from rlhf_dist.config.load import load_config
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.distributed.deepspeed import zero
from rlhf_dist.distributed.partition import MicroBatching, partition
from rlhf_dist.distributed.ray.placement import Slot
from rlhf_dist.distributed.workers.language_model import LanguageModelWorker
from rlhf_dist.evaluation.config import EvalConfig
from rlhf_dist.models.architecture import architecture
from rlhf_dist.planning import calibration, divisions, suggest
from rlhf_dist.planning.hardware import GPUS, Cluster, gpu_named, parse_bytes
from rlhf_dist.planning.memory import largest_bucket
from rlhf_dist.planning.plan import Plan, parse_counts, plan_run, scaled
from rlhf_dist.planning.rates import Rates
from rlhf_dist.planning.roles import Passes, Role, work_of
from rlhf_dist.planning.tables import as_data, memory, scaling
from rlhf_dist.ppo.build import worker_specs
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.sft.config import SFTConfig

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ROOT / "launch" / "recipes"
EIGHT_BILLION = str(RECIPES / "model_configs" / "llama-3.1-8b")


def cluster(gpus: int = 8, gigabytes: float = 80, nodes: int = 1, host: float | None = None) -> Cluster:
    memory = int(gigabytes * 1e9)
    return Cluster(GPUS["h100"], gpus, nodes, memory, int(host * 1e9) if host is not None else None)


def ppo(path: Path | str, reward: Path | str, *overrides: str) -> PPOConfig:
    base = {"--policy.model_path": str(path), "--reward.model_path": str(reward)}
    given = [word for pair in base.items() for word in pair]
    given += ["--run_dir", "runs/x", "--data.prompts", "[{path: p.jsonl, kind: prompt}]", "--device", "cuda"]
    return load_config(PPOConfig, None, [*given, *overrides])


@pytest.fixture
def eight_billion() -> PPOConfig:
    """The recipe, on its eight GPUs."""
    overrides = ["--policy.model_path", EIGHT_BILLION, "--reward.model_path", EIGHT_BILLION]
    return load_config(PPOConfig, RECIPES / "llama_8b_ppo.yaml", overrides)


def test_roles_are_those_that_a_run_hosts(tiny_lm: Path, tiny_rm: Path):
    config = ppo(tiny_lm, tiny_rm, "--value.num_ranks", "3", "--rollout.precision", "fp32")
    roles = work_of(config).roles
    specs = worker_specs(config)
    assert [(role.name, role.placement) for role in roles] == [(spec.role, spec.placement) for spec in specs]
    assert roles[-1].precision == specs[-1].build.keywords["precision"] == "fp32"


@pytest.mark.parametrize("tokens", [None, 500])
@pytest.mark.parametrize(("rows", "ranks"), [(64, 4), (5, 4), (3, 7), (7, 2)])
def test_micro_batches_are_those_of_the_split(rows: int, ranks: int, tokens: int | None, tiny_lm: Path):
    """Of sequences as long as allowed, as `cluster.partition` splits them."""
    settings = {"model_path": str(tiny_lm), "num_ranks": ranks, "micro_batch_size": 3, "micro_batch_tokens": tokens}
    host = SFTConfig.model_validate(
        {
            "run_dir": "x",
            "model": settings,
            "data": {"train": [{"path": "t", "kind": "text"}], "max_length_tokens": 100},
        }
    ).model
    role = Role("model", host, str(tiny_lm), "bf16", False)
    passes = Passes(rows, 100, 99)
    shares = partition([100] * rows, ranks, MicroBatching(3, tokens))
    assert role.num_micro_batches(passes) == max(map(len, shares))
    assert role.micro_sequences(passes) == max(len(micro) for share in shares for micro in share)
    assert role.idle_ranks(passes) == sum(not any(share) for share in shares)


def test_a_pair_is_two_sequences_that_stay_together(tiny_rm: Path):
    model = {"model_path": str(tiny_rm), "micro_batch_size": 4, "num_ranks": 2}
    data = {"train": [{"path": "t", "kind": "preference"}], "max_length_tokens": 64}
    config = RewardConfig.model_validate({"run_dir": "x", "model": model, "data": data, "reward": {"batch_size": 12}})
    (role,) = work_of(config).roles
    (step,) = role.update
    assert (step.sequences, role.sequences_per_rank(step), role.micro_sequences(step)) == (24, 12, 8)
    assert role.num_micro_batches(step) == 2


def test_the_kv_cache_is_as_large_as_a_real_one(tiny_lm: Path):
    prompts = prompt_batch([6, 6, 6])
    model = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.bfloat16)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prompts.tokens, past_key_values=cache, use_cache=True)
    real = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    assert 3 * 6 * 2 * architecture(str(tiny_lm)).kv_elements_per_token == real


@pytest.mark.parametrize("bucket_bytes", [1, 10_000, 60_000, 10**9])
def test_the_largest_bucket_is_that_of_the_sync(bucket_bytes: int, tiny_lm: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.bfloat16)
    buckets = zero.parameter_buckets(model, bucket_bytes)
    real = max(sum(p.base.numel() * p.base.element_size() for p in bucket) for bucket in buckets)
    assert largest_bucket(architecture(str(tiny_lm)), "bf16", bucket_bytes) == real


def test_roles_on_a_gpu_add_up(eight_billion: PPOConfig):
    plan = plan_run(eight_billion, cluster())
    needs = {name: memory.gpu_bytes for name, memory in plan.memory.items()}
    totals = [plan.gpus[slot] for slot in sorted(plan.gpus)]
    rest = needs["value"] + needs["rollout"] + needs["reference"]
    assert totals == [needs["policy"]] * 4 + [rest + needs["reward"]] + [rest] * 3
    assert plan.fits


def test_a_plan_that_does_not_fit_says_where(eight_billion: PPOConfig):
    plan = plan_run(eight_billion, cluster(gigabytes=56))
    assert not plan.fits
    (problem,) = plan.problems
    assert "value + reference + reward + rollout need" in problem
    assert "56.0 GB" in problem
    assert "the roles ask for 8 GPUs and there are 6" in plan_run(eight_billion, cluster(gpus=6)).problems[0]
    assert "host memory" in plan_run(eight_billion, cluster(host=200)).problems[0]


def test_offload_moves_states_to_host_memory(eight_billion: PPOConfig):
    value = plan_run(eight_billion, cluster()).memory["value"]
    step = value.total("step")
    # 2 bytes of weights, 12 of states and 8 of gradients a parameter over four ranks.
    assert step.host == pytest.approx(22 * 7.505e9 / 4, rel=0.11)
    assert step.gpu < 0.2e9


@pytest.mark.parametrize(("gpus", "gigabytes"), [(8, 56), (4, 80)])
def test_suggestions_are_sufficient_as_written(
    gpus: int, gigabytes: float, eight_billion: PPOConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    there = cluster(gpus, gigabytes)

    def replan(config: Any) -> Plan:
        return plan_run(config, there)

    plan = replan(eight_billion)
    assert not plan.fits
    found = (
        suggest.sufficient_changes(eight_billion, plan, replan) + suggest.placements(eight_billion, plan, replan)[:2]
    )
    assert len(found) >= 2
    base = ["--policy.model_path", EIGHT_BILLION, "--reward.model_path", EIGHT_BILLION]
    for one in found:
        again = replan(load_config(PPOConfig, RECIPES / "llama_8b_ppo.yaml", [*base, *one.overrides]))
        assert again.fits, one.overrides
        assert again.gpus == one.plan.gpus


def test_a_layout_is_found_where_trained_roles_must_offload_and_engines_need_gpus_of_their_own(
    eight_billion: PPOConfig, monkeypatch: pytest.MonkeyPatch
):
    """Eight GPUs of 40 GB: neither a change of single roles suffices, nor engines beside the trained roles."""
    monkeypatch.chdir(ROOT)
    there = cluster(gigabytes=40)

    def replan(config: Any) -> Plan:
        return plan_run(config, there)

    found = suggest.placements(eight_billion, replan(eight_billion), replan)
    assert found
    base = ["--policy.model_path", EIGHT_BILLION, "--reward.model_path", EIGHT_BILLION]
    for one in found[:5]:
        again = replan(load_config(PPOConfig, RECIPES / "llama_8b_ppo.yaml", [*base, *one.overrides]))
        assert again.fits, one.overrides
    seconds = [one.plan.timeline.total for one in found]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 5, 8, 24, 64])
def test_layouts_take_the_gpus_there_are(gpus: int, eight_billion: PPOConfig):
    """All of them, and no GPU is given away twice."""
    plan = plan_run(eight_billion, cluster(gpus))
    seen = set()
    for change in divisions.layouts(plan, {}):
        layout = plan_run(suggest.changed(eight_billion, change), cluster(gpus)).layout
        assert not layout.misfit
        assert layout.placement.total_gpus == gpus
        seen.add(frozenset(map(tuple, layout.shares().values())))
    assert len(seen) == {1: 1, 2: 3, 3: 5, 4: 6}.get(gpus, 7)


def test_layouts_choose_policy_and_value_apart(eight_billion: PPOConfig):
    chosen = {
        (change["policy.ds_config_path"], change["value.ds_config_path"])
        for change in divisions.layouts(plan_run(eight_billion, cluster()), {3: "x.json"})
    }
    assert chosen == {(None, None), (None, "x.json"), ("x.json", None), ("x.json", "x.json")}


def test_layouts_keep_a_budget_of_tokens(tiny_lm: Path, tiny_rm: Path):
    """A role that bounds its passes by tokens is given fewer of them: `micro_batch_size` would not count."""
    plan = plan_run(ppo(tiny_lm, tiny_rm, "--policy.micro_batch_tokens", "100000"), cluster())
    asked = {change.get("policy.micro_batch_tokens") for change in divisions.layouts(plan, {})}
    longest = plan.work.prompt + plan.work.response
    assert asked == {None, longest, 4 * longest}


def test_nothing_is_suggested_that_does_not_help(eight_billion: PPOConfig):
    def replan(config: Any) -> Plan:
        return plan_run(config, cluster(gpus=8, gigabytes=16))

    assert suggest.sufficient_changes(eight_billion, replan(eight_billion), replan) == []


def test_roles_on_the_same_gpu_take_turns(tiny_lm: Path, tiny_rm: Path):
    def update(*overrides: str) -> float:
        return plan_run(ppo(tiny_lm, tiny_rm, *overrides), cluster()).timeline.seconds["update"]

    shares = ["--policy.gpus_per_rank", "0.5", "--value.gpus_per_rank", "0.5"]
    apart, together = update(), update(*shares)
    plan = plan_run(ppo(tiny_lm, tiny_rm), cluster())
    assert plan.layout.nodes.keys() == {Slot(0, i) for i in range(5)}
    assert apart < together < 2 * apart + 1e-9


def test_more_gpus_do_not_help_beyond_the_sequences(eight_billion: PPOConfig):
    plans = scaled(plan_run(eight_billion, cluster()), [8, 64, 512, 4096])
    assert [plan.cluster.num_gpus for plan in plans] == [8, 64, 512, 4096]
    # Half of 512 GPUs are the policy's, for 64 sequences a step; 8 GPUs leave nobody idle.
    assert plans[0].idle_ranks == {}
    assert plans[2].idle_ranks["policy"] == 256 - 64
    updates = [plan.timeline.phases["update"]["computing"] for plan in plans]
    assert updates[0] > updates[1] > updates[2]
    # (Whether policy or value takes longest may change; their matrices are nearly the same.)
    assert updates[3] == pytest.approx(updates[2], rel=0.1)
    assert "stops to pay" in scaling(plans).note


def test_rates_come_from_the_user(eight_billion: PPOConfig):
    slow = plan_run(eight_billion, cluster(), Rates.read({"train_efficiency": 0.1}, "x")).timeline
    usual = plan_run(eight_billion, cluster(), Rates.read({"train_efficiency": 0.4}, "x")).timeline
    assert slow.phases["update"]["computing"] == pytest.approx(4 * usual.phases["update"]["computing"])
    with pytest.raises(ConfigError, match="names the rate 'speed'"):
        Rates.read({"speed": 1}, "x")
    with pytest.raises(ConfigError, match="positive number"):
        Rates.read({"train_efficiency": -1}, "x")


def test_a_run_calibrates_its_own_phases(eight_billion: PPOConfig, tmp_path: Path):
    """After calibration, the plan of the run itself gives its times back."""
    times = {"generate": 30.0, "score": 7.0, "update": 60.0, "sync": 11.0}
    lines = [{"step": 0, "metrics": {"eval/score_mean": 1.0}}]
    for step, factor in ((1, 5.0), (2, 1.0), (3, 1.0)):  # the first one warms up
        metrics = {f"time/{phase}_s": factor * seconds for phase, seconds in times.items()}
        lines.append({"step": step, "metrics": metrics | {"rollout/response_length_mean": 300.0}})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rates = calibration.calibrated(path, eight_billion, cluster())
    again = plan_run(eight_billion, cluster(), rates, mean_response=300.0)
    assert again.timeline.seconds == pytest.approx(times)
    assert calibration.measured_seconds(path) == pytest.approx(times)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpoints_are_as_large_as_planned(zero_stage: int, precision: Any, tmp_path: Path):
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2}
    config = trained(save_tiny_lm(tmp_path / "lm", **sizes), zero_stage=zero_stage, precision=precision)
    settings = {
        "run_dir": "x",
        "model": config,
        "data": {"train": [{"path": "t", "kind": "text"}], "max_length_tokens": 64},
    }
    planned = plan_run(SFTConfig.model_validate(settings), cluster()).memory["model"].checkpoint_bytes
    with hosted(LanguageModelWorker, config=config, num_steps=2) as group:
        batch = token_batch([5, 6])
        worker_of(group).update(batch, [[0, 1]], batch.num_targets, 0)
        worker_of(group).save_checkpoint(tmp_path / "step")
    real = sum(file.stat().st_size for file in (tmp_path / "step").rglob("*") if file.is_file())
    assert planned < real < 1.01 * planned  # names and shapes on top


def test_everything_is_json(eight_billion: PPOConfig):
    plan = plan_run(eight_billion, cluster())
    data = json.loads(json.dumps(as_data(plan, scaled(plan, [8, 64]))))
    assert data["fits"] is True
    assert (
        data["roles"]["policy"]["phases"]["update"]["optimizer"]["gpu"]
        == plan.memory["policy"].phases["update"]["optimizer"].gpu
    )
    assert [entry["gpus"] for entry in data["scale"]] == [8, 64]


def test_sizes_and_names_are_read():
    assert parse_bytes("80GB", "--gpu-memory") == 80 * 10**9
    assert parse_bytes("1.5 TiB", "--gpu-memory") == 1.5 * 2**40
    for wrong in ("80 gigs", "0GB", "-1GB", "80"):
        with pytest.raises(ConfigError, match="--gpu-memory"):
            parse_bytes(wrong, "--gpu-memory")
    assert gpu_named("H100", "--gpu-type") is GPUS["h100"]
    with pytest.raises(ConfigError, match="choose one of"):
        gpu_named("h1000", "--gpu-type")
    assert parse_counts("8,64") == [8, 64]
    with pytest.raises(ConfigError, match="--scale"):
        parse_counts("8,many")


def test_an_evaluation_is_planned(tiny_lm: Path, tiny_rm: Path):
    prompts = {"prompts": [{"path": "p.jsonl", "kind": "prompt"}], "max_length_tokens": 96}
    models = {"policy": {"model_path": str(tiny_lm)}, "reward": {"model_path": str(tiny_rm)}}
    settings = {"max_response_tokens": 32, "batch_size": 4}
    config = EvalConfig.model_validate({"run_dir": "x", "data": prompts, "rollout": settings, **models})
    plan = plan_run(config, cluster())
    assert set(plan.memory) == {"reward", "rollout"}
    # Two layers of two key-value heads of 16: 128 elements a token; 96 tokens in 4 rows, in bf16; one layer is made anew.
    assert plan.memory["rollout"].phases["generate"]["KV cache"].gpu == 4 * 96 * 128 * 2 * 3 // 2
    assert plan.fits
    assert set(plan.timeline.phases) == {"generate", "score"}


def test_inline_runs_have_one_rank_of_each_role(eight_billion: PPOConfig):
    config = eight_billion.model_copy(update={"cluster": "inline"})
    plan = plan_run(config, cluster(gpus=1))
    assert {memory.role.num_ranks for memory in plan.memory.values()} == {1}
    assert len(plan.gpus) == 1
    assert plan.problems[0].startswith("policy + value + reference + reward + rollout need")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_is_frozen_needs_no_gradients_and_no_moments(tiny_lm: Path, stage: int):
    """Of the whole plan; the bytes themselves are compared with real engines in test_exact_bytes.py."""

    def planned(**part: Any) -> Any:
        model = {"model_path": str(tiny_lm), "zero_stage": stage, "micro_batch_size": 1} | part
        config = SFTConfig.model_validate(
            {
                "run_dir": "r",
                "model": model,
                "data": {"train": [{"path": "a", "kind": "text"}], "max_length_tokens": 64},
                "sft": {"batch_size": 2},
            }
        )
        return plan_run(config, cluster())

    whole, lora, head = planned(), planned(lora={"rank": 2}), planned(freeze={"all_but_head": True})
    needs = [plan.memory["model"] for plan in (whole, lora, head)]
    assert [n.model.num_parameters for n in needs] == [needs[0].model.num_parameters] * 3
    assert needs[1].model.num_trained == 2 * sum(
        sum(shape) for name, shape in needs[0].model.parameters if "_proj" in name
    )
    assert needs[2].model.num_trained == dict(needs[0].model.parameters)["lm_head.weight"][0] * 64
    for less in needs[1:]:
        assert less.phases["step"]["optimizer"].total < 0.5 * needs[0].phases["step"]["optimizer"].total
        assert less.model_bytes == needs[0].model_bytes
    # Nothing is kept of layers that no trained parameter comes before.
    assert needs[2].phases["update"]["activations"].gpu < 0.5 * needs[0].phases["update"]["activations"].gpu
    assert sum(whole.timeline.phases["update"].values()) > sum(lora.timeline.phases["update"].values())
    assert "parameters are trained" in memory(lora).note
    assert "parameters are trained" not in memory(whole).note
    assert as_data(lora)["roles"]["model"]["num_trained_parameters"] == needs[1].model.num_trained
