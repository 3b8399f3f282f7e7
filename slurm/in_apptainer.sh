#!/usr/bin/env bash
# in_apptainer.sh [OPTION...] IMAGE COMMAND...: `apptainer exec` on a node, with the GPUs that the job has on this one.
set -euo pipefail

gpus=()
[[ "${SLURM_GPUS_ON_NODE:-0}" == 0 ]] || gpus=(--nv)
exec apptainer exec "${gpus[@]}" "$@"
