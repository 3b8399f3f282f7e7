"""Which tests run when: the three tiers, in one table.

    pytest               FAST: every module, each trainer inline and once on Ray with two ranks, the core of the invariants
    pytest -m slow       what CI runs besides: whole runs on Ray, a cluster of two hosts, a Slurm, a browser
    pytest -m matrix     every layout, further Slurm scenarios, mutations, wide sweeps

A test is of the tier that the first matching line names (a regular expression on its id below tests/, whole folders and files
included); without a line it is FAST unless it carries the mark itself.
"""

from __future__ import annotations

import re

FAST, SLOW, MATRIX = "", "slow", "matrix"

TIERS: list[tuple[str, str]] = [
    # -- invariants: about a dozen trainings of the fifty layouts
    (
        r"invariants/test_layouts.py::test_zero_stages_and_ranks\[(2-2-SFT|3-2-RM|3-2-PPO policy \+ PTX|2-2-PPO value)\]",
        FAST,
    ),
    (r"invariants/test_layouts.py::test_micro_batch_sizes\[1-PPO policy \+ PTX\]", FAST),
    (r"invariants/test_layouts.py::test_token_budgets\[2-3-(RM|PPO policy, other terms)\]", FAST),
    (r"invariants/test_layouts.py::test_packed_forward_passes\[2-2-True-(SFT|PPO policy \+ PTX)\]", FAST),
    (r"invariants/test_layouts.py::test_inline_and_ray_agree_in_every_bit\[2-(SFT|PPO policy \+ PTX)\]", FAST),
    (r"invariants/test_layouts.py::test_the_reference_loop_meets_every_case", FAST),
    (r"invariants/test_layouts.py", MATRIX),
    (r"invariants/test_partly_trained_layouts.py::test_low_margin.*\[2-2-0.3\]", FAST),
    (r"invariants/test_partly_trained_layouts.py::test_partly_trained.*2-3.*lora all-linear", SLOW),
    (r"invariants/test_partly_trained_layouts.py", MATRIX),
    (r"invariants/test_ranks_decide_alike.py::test_(one_row|a_policy).*ray ranks=2 zero=2 micro=\d+\]", SLOW),
    (r"invariants/test_ranks_decide_alike.py", MATRIX),
    (r"invariants/test_iteration.py::test_scores_to_weights", MATRIX),
    (r"invariants/test_rollout_tokens.py::test_fewer_prompts_than_ranks", SLOW),
    (r"invariants/test_rollout_tokens.py.*ranks=3", MATRIX),
    (r"invariants/test_rollout_tokens.py.*ray ranks=1", MATRIX),
    (r"invariants/test_sft_mix_layouts.py.*ranks=3", MATRIX),
    (r"invariants/test_sft_mix_layouts.py.*ray ranks=2 zero=3", MATRIX),
    (r"invariants/test_sft_mix_layouts.py.*ray", SLOW),
    # -- integration
    (
        r"integration/test_end_to_end.py::test_two_zero_ranks_on_ray_follow_the_same_trajectory\[(sft|reward|ppo)-2\]",
        FAST,
    ),
    (r"integration/test_end_to_end.py::test_two_zero_ranks_on_ray.*-1\]", MATRIX),
    (r"integration/test_end_to_end.py::test_two_zero_ranks_on_ray", SLOW),
    (r"integration/test_end_to_end.py::test_(saved_models_load|training_moves)", FAST),
    (
        r"integration/test_slurm.py::test_(ranks_on_both_nodes|a_preempted_job|a_job_submitted_by_the_command_line)",
        SLOW,
    ),
    (r"integration/test_slurm.py", MATRIX),
    (r"integration/test_two_hosts.py", MATRIX),
    (r"integration/test_resume.py::.*ppo-inline-off-policy", SLOW),
    (r"integration/test_resume.py::.*(ppo-ray|killed.*reward-inline)", MATRIX),
    (r"integration/test_pipeline.py::test_on_ray_killed", MATRIX),
    (r"integration/test_partly_trained.py::.*\[2-3-ray\]", MATRIX),
    (r"integration/test_ray_job.py::test_(ctrl_c_asks_what_becomes_of_the_job\[l\]|the_plain_line)", MATRIX),
    (r"integration/test_private_ray.py::test_ranks_on_a_cluster", MATRIX),
    (r"integration/", SLOW),
    (r"learning/test_ppo_reaches_the_optimum.py.*kl-in-reward", SLOW),
    (r"learning/test_ppo_reaches_the_optimum.py", MATRIX),
    (r"unit/distributed/deepspeed/test_hpz.py::test.*", MATRIX),
    (r"unit/distributed/test_rollout_engines.py::test_(lost_prompts.*\[kill\]|an_error_that|versions_may)", FAST),
    (
        r"unit/distributed/test_rollout_engines.py::test_(deaths_of_the_new|chunks_that|.*\[load_bucket\]|without_a)",
        MATRIX,
    ),
    (r"unit/distributed/test_rollout_engines.py", SLOW),
    (r"unit/cli/test_fuzz_commands.py", SLOW),
    # -- further cases of what is also in the fast tier
    (r"unit/distributed/deepspeed/test_bf16.py::test_many_micro_batches_add_up_in_fp32\[[13]\]", MATRIX),
    (r"unit/planning/test_exact_bytes.py", MATRIX),
    (r"unit/models/test_families.py.*\[(Llama|Qwen3|Gemma 3)\]", SLOW),
    (r"unit/models/test_families.py", MATRIX),
    (r"unit/launch/test_docs.py::test_the_plans_are_current", SLOW),
    (r"unit/launch/test_recipes.py::test_it_fits_on_paper\[llama_70b_ppo\]", SLOW),
    (r"unit/planning/test_plan_command.py::test_host_memory", SLOW),
    # -- DeepSpeed's CPUAdam is compiled when it is first used: more than a minute
    (r"unit/distributed/deepspeed/test_cpu_adam.py::test_(it_takes|an_aborted|matrices)", SLOW),
    (r"unit/distributed/deepspeed/test_fp16.py::test_overflows_with_the_optimizer_in_cpu_memory", SLOW),
    (r"unit/launch/test_ds_configs.py::test_it_trains_like_the_generated_configuration\[.*offload.*", SLOW),
    (r"learning/test_recovers_bradley_terry.py.*\[1500-4\]", SLOW),
    (r"learning/test_recovers_bradley_terry.py", MATRIX),
]


def tier_of(test: str) -> str | None:
    """`slow`, `matrix` or "" (fast) of a test id below tests/; None where the table has no line for it."""
    return next((tier for pattern, tier in TIERS if re.match(pattern, test)), None)
