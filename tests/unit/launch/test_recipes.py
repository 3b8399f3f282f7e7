"""Every recipe passes its schema; those with data beside the checkout are checked as far as a run is without starting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny import save_tiny_lm, save_tiny_rm
from transformers import LlamaConfig

from rlhf_dist.cli.main import main
from rlhf_dist.config.load import load_config
from rlhf_dist.core.errors import ConfigError
from rlhf_dist.curation.config.self_instruct import SelfInstructConfig
from rlhf_dist.curation.prompts import PromptTemplate
from rlhf_dist.curation.self_instruct import PROMPT, SelfInstruct, read_seeds
from rlhf_dist.data.bad_rows import BadRows
from rlhf_dist.distributed.ray.placement import plan_placement
from rlhf_dist.pipeline import command as pipeline
from rlhf_dist.pipeline.arguments import CONFIG_COMMANDS, schema_of
from rlhf_dist.pipeline.commands import validate
from rlhf_dist.planning.arguments import parse
from rlhf_dist.planning.command import planned
from rlhf_dist.ppo.build import worker_specs
from rlhf_dist.quickstart.recipes import RECIPES as QUICKSTARTS
from rlhf_dist.quickstart.recipes import Stages, ppo_config, reward_config, sft_config

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ROOT / "launch" / "recipes"
COMMANDS = {"gsm8k_sft": "sft", "movie_reward": "reward", "movie_ppo": "ppo", "movie_pipeline": "pipeline"}
COMMANDS |= {"movie_preferences": "pipeline"}
COMMANDS |= {"llama_8b_ppo_64gpu": "ppo"}
COMMANDS |= {f"llama_{size}_{command}": command for size in ("1b", "8b", "70b") for command in ("sft", "reward", "ppo")}
NODES = {name: 1 for name in COMMANDS if name.startswith("llama")}
"""Recipes by the number of nodes of eight GPUs that they are for."""
NODES |= {"llama_8b_ppo_64gpu": 8, "llama_70b_sft": 4, "llama_70b_reward": 4, "llama_70b_ppo": 8}
MAKING_DATA = {"self_instruct", "label"}
"""Recipes that train nothing; tested below and with their commands."""
RECORDS: dict[str, Callable[[int], dict[str, object]]] = {
    "sft": lambda i: {"messages": [{"role": "user", "content": f"calm {i}"}, {"role": "assistant", "content": "kind"}]},
    "reward": lambda i: {"prompt": f"calm {i}", "chosen": "kind", "rejected": "crime"},
    "ppo": lambda i: {"prompt": f"calm {i}"},
}
"""A record of its own for each number: a split keeps records of one prompt together."""
KINDS = {"sft": "messages", "reward": "preference", "ppo": "prompt"}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch):
    """Paths of the recipes are relative to the repository root."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A policy and a reward model of a context that holds the recipes' texts in bytes, as the tiny tokenizer has them."""
    folder = tmp_path_factory.mktemp("long")
    context = {"max_position_embeddings": 4096}
    return {"lm": str(save_tiny_lm(folder / "lm", **context)), "rm": str(save_tiny_rm(folder / "rm", **context))}


def load(name: str, *overrides: str):
    return load_config(schema_of(COMMANDS[name]), RECIPES / f"{name}.yaml", overrides)


def test_every_recipe_is_tested():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == COMMANDS.keys() | MAKING_DATA
    assert set(COMMANDS.values()) <= CONFIG_COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_it_passes_the_schema(name: str):
    assert load(name).run_dir.is_relative_to(Path("runs").absolute())


@pytest.mark.parametrize("name", COMMANDS)
def test_its_header_says_how_to_run_it(name: str):
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"rlhf-dist {COMMANDS[name]} launch/recipes/{name}.yaml" in text


def test_gsm8k(shared_data: Path, models: dict[str, str], tmp_path: Path):
    overrides = ["--model.model_path", models["lm"], "--data.max_length_tokens", "4096"]
    summary = validate("sft", load("gsm8k_sft", *overrides, "--run_dir", str(tmp_path / "run")))
    assert summary["training records"] == 1000
    assert summary["held-out records"] == 200


def test_movie_reviews(shared_data: Path, models: dict[str, str], tmp_path: Path):
    overrides = ["--model.model_path", models["lm"], "--data.max_length_tokens", "512"]
    summary = validate("reward", load("movie_reward", *overrides, "--run_dir", str(tmp_path / "run")))
    # Some 10,600 rated sentences make half as many pairs at the most; a few meet no other of another rating.
    total = summary["training records"] + summary["held-out records"]
    assert 5000 < total < 5310
    assert summary["held-out records"] == round(0.1 * total)


def test_movie_ppo(shared_data: Path, models: dict[str, str], tmp_path: Path):
    overrides = ["--policy.model_path", models["lm"], "--reward.model_path", models["rm"]]
    overrides += ["--data.max_length_tokens", "512", "--run_dir", str(tmp_path / "run")]
    summary = validate("ppo", load("movie_ppo", *overrides))
    assert summary["prompts"] == 64
    assert summary["held-out prompts"] == 32
    assert summary["optimizer steps an iteration"] == 4


def test_movie_pipeline(shared_data: Path, models: dict[str, str], tmp_path: Path):
    overrides = ["--sft.model.model_path", models["lm"], "--run_dir", str(tmp_path / "run"), "--cluster", "inline"]
    for stage in ("sft", "reward", "ppo", "eval"):
        overrides += [f"--{stage}.data.max_length_tokens", "512"]
    summary = pipeline.validate(load("movie_pipeline", *overrides))
    assert summary["data: reviews.sft"] == summary["sft: training records"] == 4772
    assert summary["data: reviews.eval"] == summary["eval: instructions"] == 1061
    assert summary["ppo: prompts"] == 64
    assert summary["eval: prompts"] == summary["ppo: held-out prompts"] == 32


def test_self_instruct(shared_data: Path, tmp_path: Path):
    config = load_config(SelfInstructConfig, RECIPES / "self_instruct.yaml", ["--out_dir", str(tmp_path / "out")])
    seeds = read_seeds(config.seeds, BadRows())
    state = SelfInstruct(config, seeds, PromptTemplate(config.prompt_path, PROMPT))
    assert len(seeds) == 175
    assert len(state.next_requests()) == config.generator.batch_size
    assert (
        "rlhf-dist data self-instruct launch/recipes/self_instruct.yaml" in (RECIPES / "self_instruct.yaml").read_text()
    )


def test_movie_prompts_held_out_are_other_movies():
    train, held_out = (
        [json.loads(line)["prompt"] for line in (RECIPES / name).read_text(encoding="utf-8").splitlines()]
        for name in ("movie_prompts.jsonl", "movie_prompts_eval.jsonl")
    )
    assert len(set(train + held_out)) == len(train) + len(held_out)


@pytest.mark.parametrize("name", NODES)
def test_it_fits_on_paper(name: str, capsys: pytest.CaptureFixture[str]):
    """On GPUs of 80 GB."""
    arguments = ["plan", str(RECIPES / f"{name}.yaml"), "--gpus", "8", "--nodes", str(NODES[name]), "--format", "json"]
    fits = main([*arguments, "--gpu-memory", "80GB"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["command"] == COMMANDS[name]
    assert not plan["idle_ranks"]
    assert fits, plan["problems"]


def test_the_70b_recipe_divides_a_copy_of_the_policy_over_a_node(capsys: pytest.CaptureFixture[str]):
    """As one GPU cannot hold it. The plan says what a sync of it is."""
    config = load("llama_70b_ppo")
    assert (config.rollout.engine, config.rollout.tensor_parallel_size, config.rollout.num_engines) == ("vllm", 8, 1)
    recipe = str(RECIPES / "llama_70b_ppo.yaml")
    arguments = ["plan", recipe, "--gpus", "8", "--nodes", "8", "--gpu-memory", "80GB"]
    assert main([*arguments, "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len({gpu["node"] for gpu in plan["gpus"] if "rollout" in gpu["roles"]}) == 1
    # 70.55 billion parameters of two bytes, received by every rank of the engine.
    assert plan["weight_sync_transport"] == "broadcast"
    assert plan["weight_sync_bytes"] == pytest.approx(8 * 141.1e9, rel=1e-3)
    assert 4 < sum(plan["timeline_s"]["sync"].values()) < 20
    whole = ["--rollout.engine", "hf", "--rollout.tensor_parallel_size", "1", "--rollout.batch_size", "8"]
    assert main([*arguments, *whole, "--format", "json"]) == 6
    assert json.loads(capsys.readouterr().out)["problems"][0].startswith("rollout needs 156.9 GB on each of 8 GPUs")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in NODES])
def test_the_small_ones_fit_this_machine(name: str, models: dict[str, str], capsys: pytest.CaptureFixture[str]):
    """SmolLM2-135M on CPUs, by the sizes of that model."""
    size = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    size |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
    path = Path(models["lm"]).parent / "smollm2-135m"
    LlamaConfig(**size).save_pretrained(path)
    section = {"sft": "model", "reward": "model", "ppo": "policy", "pipeline": "sft.model"}[COMMANDS[name]]
    arguments = ["plan", str(RECIPES / f"{name}.yaml"), f"--{section}.model_path", str(path), "--device", "cpu"]
    arguments += ["--reward.model_path", str(path)] if COMMANDS[name] == "ppo" else []
    assert main([*arguments, "--cpu-memory", "24GB", "--format", "json"]) == 0, capsys.readouterr().err
    plan = json.loads(capsys.readouterr().out)
    plan = plan["sft"] if COMMANDS[name] == "pipeline" else plan
    assert plan["fits"]
    assert plan["cluster"]["gpu"]["name"] == "CPU"


@pytest.mark.parametrize("recipe", QUICKSTARTS.values(), ids=list(QUICKSTARTS))
def test_the_quickstart_fits_this_machine(recipe, models: dict[str, str], tmp_path: Path):
    """Its stages are ordinary configurations: planned, with the model that they are all made from."""
    stages = Stages(tmp_path)
    sft = sft_config(recipe, stages, Path(models["lm"]), 0, "ray")
    reward, ppo = reward_config(recipe, stages, 0, "ray"), ppo_config(recipe, stages, 0, "ray")
    reward = reward.model_copy(update={"model": reward.model.model_copy(update={"model_path": models["lm"]})})
    changes = {
        role: getattr(ppo, role).model_copy(update={"model_path": models["lm"]})
        for role in ("policy", "reward", "value", "reference")
    }
    for config in (sft, reward, ppo.model_copy(update=changes)):
        parts = parse("plan", "", ["ppo"], ["c.yaml", "--cpu-memory", "24GB"])
        assert parts is not None
        assert not planned(config, parts)[0].problems


@pytest.mark.parametrize("name", NODES)
def test_it_can_be_run_with_a_tiny_model(name: str, models: dict[str, str], tmp_path: Path):
    """All that is checked before a start, with stand-ins for models and data."""
    command = COMMANDS[name]
    records = tmp_path / "records.jsonl"
    rows = [RECORDS[command](i) for i in range(200)]
    records.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = f"[{{path: {records}, kind: {KINDS[command]}}}]"
    overrides = ["--run_dir", str(tmp_path / "run"), "--data.prompts" if command == "ppo" else "--data.train", source]
    if command == "ppo":
        overrides += ["--policy.model_path", models["lm"], "--reward.model_path", models["rm"]]
    else:
        overrides += ["--model.model_path", models["lm"]]
    assert validate(command, load(name, *overrides))


def placement_of(config):
    return plan_placement({spec.role: spec.placement for spec in worker_specs(config)}, "cuda")


def test_the_8b_recipe_takes_eight_gpus():
    config = load("llama_8b_ppo")
    plan = placement_of(config)
    assert plan.total_gpus == 8
    assert plan.ranks["policy"] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert not set(plan.ranks["policy"]) & {b for role in ("value", "rollout", "reward") for b in plan.ranks[role]}
    assert plan.ranks["value"] == plan.ranks["rollout"] == plan.ranks["reference"]
    assert plan.ranks["reward"] == plan.ranks["value"][:1]


def test_the_8b_recipe_has_no_share_to_give_away():
    with pytest.raises(ConfigError, match="shared GPU 0"):
        placement_of(load("llama_8b_ppo", "--reward.gpus_per_rank", "0.2"))
