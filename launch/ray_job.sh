#!/usr/bin/env bash
# Submit a run to a Ray cluster and follow its log:
#
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 launch/ray_job.sh ppo CONFIG.yaml [--section.key VALUE ...]
#
# The current directory travels with the job; files that .gitignore names stay here. The driver runs on the cluster, so the
# run continues when this terminal closes, and when it is submitted again. rlhf_dist must be installed on the nodes.
# `rlhf-dist submit --ray` does the same and more: it checks the configuration here, takes the installed code along, and asks at
# Ctrl-C. See launch/README.md.
set -euo pipefail

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

[[ $# -ge 2 ]] || fail "usage: $0 COMMAND CONFIG.yaml [--section.key VALUE ...], with COMMAND sft, reward, ppo, eval or pipeline"
command="$1" config="$2"
shift 2

[[ -f "$config" ]] || fail "the configuration '$config' does not exist in $PWD; give the path of a YAML file"

# said KEY: what the file says of a key of its top level.
said() {
    sed -nE "s/^$1[[:space:]]*:[[:space:]]*(.*)\$/\\1/p" "$config"
}

# told KEY ARGUMENTS...: what an argument (the last one counts), or else the file, says of it.
told() {
    local value previous="" argument
    value="$(said "$1")"
    for argument in "${@:2}"; do
        [[ "$previous" != "--$1" ]] || value="$argument"
        [[ "$argument" != "--$1="* ]] || value="${argument#*=}"
        previous="$argument"
    done
    printf '%s' "$value"
}

resume=()
case "$command" in
    sft | reward | ppo) # submitted again, a run continues where the last job ended, unless the file or an argument says otherwise
        overwrite="$(told overwrite "$@")"
        shopt -s nocasematch
        [[ -n "$(said resume)" || "$overwrite" =~ ^[\'\"]?(true|t|yes|y|on|1)[\'\"]?([[:space:]]|$) ]] || resume=(--resume auto)
        shopt -u nocasematch
        ;;
    eval | pipeline) ;; # one is always run whole, the other always continues
    *) fail "the command is '$command'; a job is one of sft, reward, ppo, eval, pipeline" ;;
esac

# The job starts in a copy of this directory that goes with it: results do not belong there.
run_dir="$(told run_dir "$@")"
[[ "$run_dir" =~ ^[\'\"]?/ ]] || fail "run_dir is '$run_dir', which is not absolute: the results would be written into Ray's" \
    "copy of this directory, and vanish with it; give --run_dir /PATH on storage that the nodes share"
[[ -n "${RAY_API_SERVER_ADDRESS:-}" ]] ||
    fail "RAY_API_SERVER_ADDRESS is not set; set it to the cluster's dashboard, such as http://HEAD:8265"
command -v ray >/dev/null || fail "there is no 'ray' command here; install rlhf_dist in this environment"

# Ray clusters ask for a token. The command line sends one only in this mode.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
if [[ "$RAY_AUTH_MODE" == token && -z "${RAY_AUTH_TOKEN:-}" ]]; then
    token_path="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
    [[ -s "$token_path" ]] ||
        fail "there is no token in RAY_AUTH_TOKEN or in $token_path; copy the head node's ~/.ray/auth_token there"
fi

# `auto` joins the cluster that the job runs on.
exec ray job submit --working-dir . -- rlhf-dist "$command" "$config" --ray.address auto "${resume[@]}" "$@"
