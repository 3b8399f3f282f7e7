"""The commands from Python: `python launch/python_api.py sft CONFIG.yaml [--section.key value ...]`."""

import sys

from rlhf_dist import RlhfDistError, load_config, run_eval, run_ppo, run_reward, run_sft

RUN = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo, "eval": run_eval}

command, path, *overrides = sys.argv[1:]
try:
    summary = RUN[command](load_config(command, path, overrides))
except RlhfDistError as error:  # its message names value, constraint and remedy
    sys.exit(f"{type(error).__name__}: {error}")
print(summary["seed"], summary["wall_time_s"])
