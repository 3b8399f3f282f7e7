"""`rlhf-dist quickstart`: the whole job on embedded data, and an honest account of what it achieved.

RUN_DIR/
  00_data/  00_init/  01_pretrain/  02_sft/  03_reward/  04_ppo/     each an ordinary run folder, with its model/
  summary.json                                                     the numbers below, all measured in this run
  samples/before_after.jsonl                                       every held-out prompt with both answers
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from rlhf_dist.core.errors import RunFolderError
from rlhf_dist.ppo.build import run_ppo
from rlhf_dist.quickstart.gold import gold_score, summarize_gold
from rlhf_dist.quickstart.lexicon import human_ratings
from rlhf_dist.quickstart.recipes import (
    ClusterKind,
    Recipe,
    Stages,
    ppo_config,
    pretrain_config,
    recipe_named,
    reward_config,
    sft_config,
)
from rlhf_dist.quickstart.records import follows_prompt, write_records
from rlhf_dist.reward.build import run_reward
from rlhf_dist.run.launch import open_session
from rlhf_dist.run.run_folder import RunFolder
from rlhf_dist.sft.build import run_sft

logger = logging.getLogger(__name__)

Summary = dict[str, Any]
NUM_SAMPLES = 6
"""Before/after samples on the terminal."""


def run(
    run_dir: Path, model: str = "tiny", seed: int = 0, cluster: ClusterKind = "ray", overwrite: bool = False
) -> Summary:
    """Run every stage and write `summary.json`; returns it.

    Raises:
        ConfigError: an unknown `model`.
        RunFolderError: `run_dir` holds an earlier run and `overwrite` is false.
        DataError, ModelError: the packages that the data or the model are taken from are absent.
    """
    recipe = recipe_named(model)
    RunFolder.check(run_dir, resume=False, overwrite=overwrite)
    human_ratings()
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    base_model = _timed(seconds, "prepare", lambda: _existing_model(recipe))
    folder = RunFolder.open(run_dir, resume=False, overwrite=overwrite)
    _drop_empty(folder)
    folder.write_config(yaml.safe_dump({"quickstart": {"model": model, "seed": seed, "cluster": cluster}}))
    stages = Stages(run_dir)
    console = Console()
    console.print(f"[bold]quickstart[/bold]: {model}, seed {seed}, in {run_dir}")
    files = _timed(seconds, "data", lambda: write_records(stages.data, seed))
    if base_model is None:
        base_model = _timed(seconds, "init", lambda: _make_tiny_model(stages, files, seed))
    results = _train(recipe, stages, base_model, seed, cluster, seconds)
    summary = _summarize(recipe, stages, files, results)
    summary = {"model": model, "seed": seed, "cluster": cluster, **summary, "seconds": seconds}
    seconds["total"] = time.perf_counter() - started
    folder.write_summary(summary)
    _show(console, summary, run_dir)
    return summary


def _train(
    recipe: Recipe, stages: Stages, base_model: Path, seed: int, cluster: ClusterKind, seconds: dict[str, float]
) -> dict[str, Summary]:
    """The stages, hosted in one session: Ray starts once."""
    results: dict[str, Summary] = {}
    session = open_session(sft_config(recipe, stages, base_model, seed, cluster))
    try:
        if recipe.pretrain is not None:
            config = pretrain_config(recipe, stages, base_model, seed, cluster)
            results["pretrain"] = _timed(seconds, "pretrain", lambda: run_sft(config, session))
            base_model = stages.pretrain / "model"
        sft = sft_config(recipe, stages, base_model, seed, cluster)
        results["sft"] = _timed(seconds, "sft", lambda: run_sft(sft, session))
        reward = reward_config(recipe, stages, seed, cluster)
        results["reward"] = _timed(seconds, "reward", lambda: run_reward(reward, session))
        ppo = ppo_config(recipe, stages, seed, cluster)
        results["ppo"] = _timed(seconds, "ppo", lambda: run_ppo(ppo, session))
    finally:
        session.close()
    return results


def _timed(seconds: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = work()
    seconds[name] = time.perf_counter() - started
    return result


def _drop_empty(folder: RunFolder) -> None:
    """The stages have checkpoints and logs of their own."""
    for path in (folder.checkpoints_dir, folder.logs_dir):
        path.rmdir()


def _existing_model(recipe: Recipe) -> Path | None:
    """The pretrained model's directory; None for the tiny model, which is made here."""
    if recipe.name != "smollm2":
        return None
    from rlhf_dist.quickstart.smollm2 import ensure_smollm2

    return ensure_smollm2()


def _make_tiny_model(stages: Stages, files: Mapping[str, Path], seed: int) -> Path:
    """Tokenizer trained on the training texts, model with random weights."""
    from rlhf_dist.quickstart.tiny_model import save_tiny_model
    from rlhf_dist.quickstart.tokenizer import VOCAB_SIZE, train_tokenizer, training_texts

    rows = [*_read_jsonl(files["pretrain"]), *_read_jsonl(files["sft_train"])]
    chat_template = (resources.files("rlhf_dist.data") / "instruction_template.jinja").read_text("utf-8")
    tokenizer = train_tokenizer(training_texts(rows, chat_template), VOCAB_SIZE)
    tokenizer.chat_template = chat_template
    num_parameters = save_tiny_model(stages.init, tokenizer, seed)
    logger.info("tiny model: %d parameters, %d tokens", num_parameters, len(tokenizer))
    return stages.init


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -- What it achieved -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """The answers to all held-out prompts, before and after PPO, in the same order."""

    prompts: list[str]
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


def read_answers(ppo_dir: Path, prompts: Sequence[str]) -> Answers:
    """The first and the last evaluation that PPO wrote: before is the SFT model, after the tuned policy.

    `prompts` are the held-out prompts as in the data file; RunFolderError when the rows are not one for each of them.
    """
    files = sorted((ppo_dir / "eval").glob("step_*.jsonl"), key=lambda path: int(path.stem.removeprefix("step_")))
    if len(files) < 2:
        raise RunFolderError(
            f"{ppo_dir / 'eval'} holds {len(files)} evaluations; one before and one after PPO are needed. "
            "Run the quickstart again with --overwrite."
        )
    before, after = _read_jsonl(files[0]), _read_jsonl(files[-1])
    if not len(before) == len(after) == len(prompts):
        raise RunFolderError(
            f"{ppo_dir / 'eval'}: {len(before)} answers before and {len(after)} after PPO, for {len(prompts)} held-out "
            "prompts; there must be one each. Run the quickstart again with --overwrite."
        )
    return Answers(list(prompts), before, after)


def compare_gold(answers: Answers) -> Summary:
    """Gold scores before and after, and the gain paired by prompt with its standard error."""
    texts = {when: [row["response"] for row in getattr(answers, when)] for when in ("before", "after")}
    gains = [
        gold_score(after).valence - gold_score(before).valence
        for before, after in zip(texts["before"], texts["after"], strict=True)
    ]
    mean = sum(gains) / len(gains)
    variance = sum((gain - mean) ** 2 for gain in gains) / max(len(gains) - 1, 1)
    sides = {
        when: summarize_gold(responses).to_dict()
        | {
            "follows_prompt_share": sum(map(follows_prompt, answers.prompts, responses)) / len(responses),
        }
        for when, responses in texts.items()
    }
    return {
        **sides,
        "gain_mean": mean,
        "gain_stderr": math.sqrt(variance / len(gains)),
        "real_word_share_kept": sides["after"]["real_word_share"] / max(sides["before"]["real_word_share"], 1e-9),
    }


def _summarize(recipe: Recipe, stages: Stages, files: Mapping[str, Path], results: Mapping[str, Summary]) -> Summary:
    prompts = [row["prompt"] for row in _read_jsonl(files["prompts_eval"])][: recipe.eval_prompts]
    answers = read_answers(stages.ppo, prompts)
    rows = [
        {"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, answers.before, answers.after, strict=True)
    ]
    for row in rows:
        for when in ("before", "after"):
            kept = {key: row[when].get(key) for key in ("response", "score", "kl")}
            row[when] = kept | {"gold": gold_score(kept["response"]).valence}
    path = stages.run_dir / "samples" / "before_after.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    stage_facts = {name: results[name] for name in ("pretrain", "sft") if name in results}
    return {
        **stage_facts,
        "reward": {**results["reward"], "chance_accuracy": 0.5},
        "ppo": {**results["ppo"], "gold": compare_gold(answers), "samples": rows[:NUM_SAMPLES]},
    }


# -- The terminal -----------------------------------------------------------------------------------------------------


def _show(console: Console, summary: Summary, run_dir: Path) -> None:
    console.print(_numbers_table(summary))
    console.print(_samples_table(summary["ppo"]["samples"]))
    console.print(
        f"{summary['seconds']['total']:.0f} s. All numbers: {run_dir / 'summary.json'}; every answer: samples/"
    )


def _numbers_table(summary: Summary) -> Table:
    table = Table(title="On held-out prompts and pairs", title_justify="left")
    for name in ("", "before", "after"):
        table.add_column(name, justify="left" if not name else "right")
    for stage, label in (("pretrain", "Pretraining loss (nats/token)"), ("sft", "SFT loss (nats/token)")):
        if stage in summary:
            sides = [summary[stage][when]["eval_loss"] for when in ("before", "after")]
            table.add_row(label, *(f"{loss:.3f}" for loss in sides))
    reward, ppo = summary["reward"], summary["ppo"]
    accuracies = [reward[when]["eval_accuracy"] for when in ("before", "after")]
    table.add_row("Reward model: agrees with people (chance 50%)", *(f"{a:.1%}" for a in accuracies))
    table.add_section()
    sides = [ppo["before"], ppo["after"]]
    table.add_row("PPO: learned reward", *(f"{s['score_mean']:.2f} ± {s['score_sem']:.2f}" for s in sides))
    gold = [ppo["gold"]["before"], ppo["gold"]["after"]]
    table.add_row("PPO: gold, human valence −4…4", *(f"{g['gold_mean']:.2f} ± {g['gold_stderr']:.2f}" for g in gold))
    table.add_row("PPO: KL to the SFT model (nats/response)", *(f"{s['kl_ref_mean']:.2f}" for s in sides))
    for key, label in (
        ("real_word_share", "PPO: real words"),
        ("distinct_word_share", "PPO: different words in an answer"),
        ("follows_prompt_share", "PPO: words asked for, asked letter"),
    ):
        table.add_row(label, *(f"{g[key]:.1%}" for g in gold))
    table.add_row("PPO: different words in all answers", *(str(g["vocabulary_size"]) for g in gold))
    gain = ppo["gold"]
    table.caption = (
        f"Gold gain, paired by prompt: {gain['gain_mean']:+.2f} ± {gain['gain_stderr']:.2f} (standard error)"
    )
    return table


def _samples_table(samples: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Answers to held-out prompts (gold score)", title_justify="left")
    for name in ("prompt", "before PPO", "after PPO"):
        table.add_column(name)
    for row in samples:
        cells = [f"{row[when]['response']} ({row[when]['gold']:+.1f})" for when in ("before", "after")]
        table.add_row(row["prompt"].replace("\n\n", " "), *cells)
    return table
