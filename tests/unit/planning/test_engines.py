"""vLLM engines on paper: what a GPU of theirs holds, how long they generate, where they lie, what is suggested for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.config.load import load_config
from rlhf_dist.planning import divisions, suggest, sync, tables
from rlhf_dist.planning.engines import EngineRank, determinism
from rlhf_dist.planning.generation import ALL_REDUCES, PREFILL, STEPS, WEIGHTS
from rlhf_dist.planning.hardware import GPUS, Cluster
from rlhf_dist.planning.plan import Plan, plan_run, scaled
from rlhf_dist.ppo.config import PPOConfig

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "launch" / "recipes" / "llama_70b_ppo.yaml"
SEVENTY_BILLION = str(ROOT / "launch" / "recipes" / "model_configs" / "llama-3.1-70b")
EIGHT_BILLION = str(ROOT / "launch" / "recipes" / "model_configs" / "llama-3.1-8b")


def cluster(gpus: int = 8, nodes: int = 8, gigabytes: float = 80) -> Cluster:
    return Cluster(GPUS["h100"], gpus, nodes, int(gigabytes * 1e9))


def of_model(path: Path | str, **rollout: Any) -> PPOConfig:
    """One rank of everything else. A prompt has half of 2,048 tokens, a response the other half."""
    return PPOConfig.model_validate(
        {
            "run_dir": "runs/x",
            "device": "cuda",
            "policy": {"model_path": str(path)},
            "reward": {"model_path": str(path)},
            "rollout": {"engine": "vllm", "max_response_tokens": 1024, **rollout},
            "data": {"max_length_tokens": 2048, "prompts": [{"path": "p.jsonl", "kind": "prompt"}]},
            "ppo": {"prompts_per_iteration": 256, "mini_batch_size": 64, "num_iterations": 1},
        }
    )


def engine_of(plan: Plan) -> EngineRank:
    engine = plan.memory["rollout"].engine
    assert engine is not None
    return engine


def seventy(**rollout: Any) -> Plan:
    settings = {"num_ranks": 8, "tensor_parallel_size": 8, "batch_size": 256} | rollout
    return plan_run(of_model(SEVENTY_BILLION, **settings), cluster())


def test_a_rank_has_its_part_of_the_matrices_and_all_norms():
    """80 layers have 855,638,016 elements of matrices each, and two norms; embeddings and head, 128,256 rows; and a norm."""
    rank = engine_of(seventy())
    matrices = 80 * 855_638_016 + 2 * 128_256 * 8192
    assert rank.weights == 2 * (matrices // 8 + 161 * 8192)
    # One of eight key-value heads, of 128 elements, keys and values, in 80 layers, two bytes each.
    assert rank.token == 40_960
    assert rank.sequence == 2048 * 40_960


def test_key_value_heads_that_are_fewer_than_ranks_are_there_several_times(tiny_lm: Path):
    """Two heads of 16 in two layers: among four ranks, each has one whole head, as among two."""

    def rank(size: int) -> EngineRank:
        return engine_of(plan_run(of_model(tiny_lm, num_ranks=4, tensor_parallel_size=size), cluster()))

    one, two, four = rank(1), rank(2), rank(4)
    assert (one.token, two.token, four.token) == (256, 128, 128)
    # The key and value matrices, of 32 × 64 in both layers, are halved but once; norms are five vectors of 64.
    norms, keys = 2 * 5 * 64, 2 * 4 * 32 * 64
    assert two.weights == (one.weights - norms) // 2 + norms
    assert four.weights == (one.weights - norms - keys) // 4 + keys // 2 + norms


def test_what_is_left_of_a_gpu_holds_so_many_sequences():
    """72 GB are taken; of them 17.641 GB are weights, 1.963 GB a layer's activations at 16,384 tokens, 1.116 GB the logits of
    256 sequences with what drawing makes of them, 3.2 GB context, NCCL and CUDA graphs: 48.08 GB hold 573 times 83.9 MB."""
    memory = 80 * 10**9
    assert engine_of(seventy()).fit_at_once(memory) == 573
    assert engine_of(seventy(vllm_options={"gpu_memory_utilization": 0.4})).fit_at_once(memory) == 96
    eager = engine_of(seventy(vllm_options={"enforce_eager": True, "max_num_batched_tokens": 2048}))
    # 2 GB of graphs and 7/8 of the activations (1.718 GB) more.
    assert eager.fit_at_once(memory) == 573 + 44
    assert engine_of(seventy(vllm_options={"gpu_memory_utilization": 0.25})).fit_at_once(memory) == 0


def test_an_engine_generates_as_fast_as_it_reads_and_adds_up():
    """By hand, for 256 sequences at once on H100s (3,350 GB/s at 60 %, 450 GB/s a link at 70 %)."""
    parts = seventy().timeline.phases["generate"]
    # A step reads 17.641 GB of weights and 256 × 1,536 × 40,960 bytes of KV cache in 16.79 ms.
    assert parts[WEIGHTS] == pytest.approx(1024 * 16.790e-3, rel=1e-3)
    # 160 all-reduces a step, of 4.194 MB, each twice 7/8 of it over the link, and 10 µs: 5.328 ms; those of prompts 3.843 s.
    assert parts[ALL_REDUCES] == pytest.approx(1024 * 5.3283e-3 + 3.8433, rel=1e-3)
    assert parts[STEPS] == pytest.approx(1.024)
    # Some 140 GFLOP a token of prompts, an eighth for each GPU of 989 TFLOP/s at half of it.
    assert parts[PREFILL] == pytest.approx(256 * 1024 * 140e9 / 8 / (0.5 * 989e12), rel=0.03)


def test_sequences_that_end_make_room_for_others():
    """Four times as many steps with a quarter of them at once, whatever the longest; the longest may be the last to start."""

    def steps(batch_size: int, mean: float | None, **options: Any) -> float:
        config = of_model(
            SEVENTY_BILLION, num_ranks=8, tensor_parallel_size=8, batch_size=batch_size, vllm_options=options
        )
        return plan_run(config, cluster(), mean_response=mean).timeline.phases["generate"][STEPS] * 1000

    assert steps(64, None) == pytest.approx(4096)
    assert steps(64, 512) == pytest.approx(2048 + 512)
    # No more are at once than have KV cache, which is 96 there.
    assert steps(256, None, gpu_memory_utilization=0.4) == pytest.approx(256 / 96 * 1024)


def test_engines_get_whole_nodes_before_single_ranks_fill_them(tiny_lm: Path):
    config = of_model(tiny_lm, num_ranks=16, tensor_parallel_size=8)
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"num_ranks": 5})})
    plan = plan_run(config, cluster(nodes=3))
    assert plan.layout.nodes_of("rollout") == [0] * 8 + [1] * 8
    assert plan.layout.nodes_of("policy") == [2] * 5
    assert len(plan.gpus) == 5 + 3 + 16
    assert plan.fits
    rollout = [need for device, need in plan.gpus.items() if plan.layout.shares()[device] == ["rollout"]]
    assert rollout == [plan.memory["rollout"].gpu_bytes] * 16


def test_an_engine_that_no_node_holds_is_said(tiny_lm: Path):
    alone = plan_run(of_model(tiny_lm, num_ranks=8, tensor_parallel_size=8), cluster(gpus=4, nodes=4))
    assert "an engine of rollout (tensor_parallel_size 8) needs 8 GPUs on one node" in alone.problems[0]
    config = of_model(tiny_lm, num_ranks=4, tensor_parallel_size=2, gpus_per_rank=0.5)
    shared = plan_run(config, cluster(gpus=3, nodes=3))
    # Policy, value, reference and reward take four GPUs; one more is on their second node.
    assert "engine 0 of rollout" not in " ".join(shared.problems)
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"num_ranks": 2})})
    shared = plan_run(config, cluster(gpus=3, nodes=3))
    assert "engine 0 of rollout has its 2 ranks (tensor_parallel_size 2) on 2 nodes" in " ".join(shared.problems)


def test_scaled_engines_stay_whole():
    plan = plan_run(load_config(PPOConfig, RECIPE, []), cluster())
    numbers = [other.memory["rollout"].role.num_ranks for other in scaled(plan, [32, 128, 512])]
    assert numbers == [8, 16, 64]


def test_vllm_takes_its_part_of_a_shared_gpu_whether_it_needs_it_or_not(tiny_lm: Path):
    shared = {"num_ranks": 1, "gpus_per_rank": 0.5, "vllm_options": {"gpu_memory_utilization": 0.9}}
    config = of_model(EIGHT_BILLION, **shared)
    reward = config.reward.model_copy(update={"gpus_per_rank": 0.5})
    config = config.model_copy(
        update={
            "reward": reward,
            "policy": config.policy.model_copy(update={"model_path": str(tiny_lm)}),
            "value": config.value.model_copy(update={"model_path": str(tiny_lm)}),
            "reference": config.reference.model_copy(update={"model_path": str(tiny_lm)}),
        }
    )

    def replan(changed: Any) -> Plan:
        return plan_run(changed, cluster(gpus=4, nodes=1))

    plan = replan(config)
    (problem,) = plan.problems
    assert (
        "vLLM takes 72.0 GB of each GPU of rollout (gpu_memory_utilization), and the other roles there leave" in problem
    )
    changes = [one.change for one in suggest.sufficient_changes(config, plan, replan)]
    (lower,) = [change["rollout.vllm_options"] for change in changes if "rollout.vllm_options" in change]
    left = 80e9 - plan.memory["reward"].gpu_bytes
    assert isinstance(lower, dict)
    assert left / 80e9 - 0.01 < lower["gpu_memory_utilization"] <= left / 80e9


def test_larger_engines_are_suggested_where_a_copy_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    """Eight engines of one GPU cannot hold 141 GB; the same eight GPUs as engines of four or eight can."""
    monkeypatch.chdir(ROOT)
    alone = ["--rollout.tensor_parallel_size", "1", "--rollout.batch_size", "32"]
    config = load_config(PPOConfig, RECIPE, alone)

    def replan(changed: Any) -> Plan:
        return plan_run(changed, cluster())

    plan = replan(config)
    assert plan.problems == ["rollout needs 178.1 GB on each of 8 GPUs of 80.0 GB"]
    found = suggest.sufficient_changes(config, plan, replan, count=2)
    assert [one.change for one in found] == [{"rollout.tensor_parallel_size": size} for size in (4, 8)]


@pytest.mark.parametrize(
    ("gpus", "nodes", "sizes"), [(8, 1, {1, 2, 4, 8}), (4, 2, {1, 2, 4}), (2, 1, {1, 2}), (6, 1, {1, 2})]
)
def test_layouts_divide_nodes_among_engines(gpus: int, nodes: int, sizes: set[int]):
    """The GPUs of all engines are a multiple of those of one, which are on one node."""
    config = of_model(EIGHT_BILLION)
    plan = plan_run(config, cluster(gpus, nodes))
    seen = set()
    for change in divisions.layouts(plan, {}):
        size, ranks = change["rollout.tensor_parallel_size"], change["rollout.num_ranks"]
        assert isinstance(size, int)
        assert isinstance(ranks, int)
        assert ranks % size == 0
        seen.add(size)
    assert seen == sizes


def test_a_sync_from_gpu_to_gpu():
    """By NCCL every rank of an engine receives all, over the link between nodes, the slowest; through the store every node."""
    config = load_config(PPOConfig, RECIPE, [])
    store = config.rollout.model_copy(update={"weight_transport": "store"})
    plan = plan_run(config.model_copy(update={"rollout": store}), cluster())
    assert plan.sync is not None
    assert (plan.sync.transport, plan.sync.receivers) == ("store", 2)
    through_store = plan.timeline.seconds["sync"]
    plan = plan_run(config, cluster())
    assert plan.sync is not None
    assert plan.sync.receivers == 8
    assert plan.sync.num_bytes == pytest.approx(8 * 141.1e9, rel=1e-3)
    parts = plan.timeline.phases["sync"]
    # 141.1 GB over 50 GB/s at 70 %.
    assert parts[sync.BROADCAST] == pytest.approx(4.03, rel=1e-2)
    assert sync.COPIES not in parts
    assert plan.timeline.seconds["sync"] < through_store / 10
    row = tables.traffic(plan).rows[0]
    assert row[:2] == ("weight sync, an iteration", "1128.9")
    assert row[2].startswith("the policy, from GPU to GPU, to 8 engine rank(s); ")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"engine": "hf"}, "equal to the last bit in any batch"),
        ({"draws": "counter"}, "up to how kernels round"),
        ({"draws": "engine"}, "nor the same run again need give the same responses"),
    ],
)
def test_what_holds_bit_for_bit_is_said(settings: dict[str, Any], says: str, tiny_lm: Path):
    plan = plan_run(of_model(tiny_lm, **settings), cluster())
    role = plan.work.role("rollout")
    assert role is not None
    assert says in determinism(role)
    (table,) = tables.rollouts(plan)
    assert says in table.note
    invariant = settings.get("draws") == "counter"
    assert ("VLLM_BATCH_INVARIANT=1" in table.note) == invariant


def test_on_cpus_nothing_is_said_of_gpus(tiny_lm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    import yaml

    values = of_model(tiny_lm, num_ranks=2, tensor_parallel_size=2).model_dump(mode="json")
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(values | {"device": "cpu"}), encoding="utf-8")
    assert main(["plan", "ppo", str(tmp_path / "ppo.yaml"), "--cpu-memory", "64GB", "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["engines"]["rollout"]["num_engines"] == 1
    assert data["engines"]["rollout"]["fit_at_once"] is None
