# What the sbatch scripts share; sourced by them. `run_on_slurm COMMAND CONFIG [--section.key VALUE ...]` starts Ray on the
# nodes of the job, runs `rlhf-dist COMMAND` against it, and takes everything down again. slurm/README.md explains it.
# shellcheck shell=bash

SLURM_PARTS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=slurm/container.sh
source "$SLURM_PARTS/container.sh"

# The driver's exit code for "told to stop, checkpoint written, run me again" (EX_TEMPFAIL of sysexits.h).
readonly PREEMPTED=75
# A driver that USR1 met before it could listen: it has nothing to save.
readonly ENDED_BY_USR1=$((128 + 10))
readonly ENDED_BY_TERM=$((128 + 15))
# Up to this one, the driver was done, or rejected the run with a message.
readonly LAST_REFUSAL=6

preempted=0          # 1: USR1 came
interrupted=0        # 1: a trapped signal came during `wait`
continued=()         # what the driver is told when it continues this job's own run
driver=""            # process id of the driver's srun, while it runs
nodes=()             # Slurm's names of the nodes, the head first
declare -A het_group # node → its component of a heterogeneous job
declare -A ray_steps # node → process id of the srun that runs Ray there

say() { printf '%(%F %T)T slurm: %s\n' -1 "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# ---------------------------------------------------------------------------------------------------- the whole job

run_on_slurm() {
    local command="$1"
    shift
    trap forward_usr1 USR1
    check_arguments "$@"
    local config="$1"
    shift

    seed_of_array_task "$config" "$@"
    make_job_dir
    trap take_down EXIT
    trap 'interrupted=1; terminated' TERM
    trap 'interrupted=1; exit 130' INT

    describe_container "$job_dir"
    list_nodes
    say "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $command on ${nodes[*]}"
    start_ray
    wait_for_nodes
    describe_resuming "$command" "$config" "$@"
    run_driver rlhf-dist "$command" "$config" --ray.address "$head_address" "${resume[@]}" "$@" "${seed_arguments[@]}" \
        "${continued[@]}"
    finish "$driver_status"
}

check_arguments() {
    [[ -n "${SLURM_JOB_ID:-}" ]] || fail "this is no Slurm job (SLURM_JOB_ID is not set); submit the script with sbatch"
    [[ $# -ge 1 ]] || fail "a configuration is needed: sbatch [OPTIONS] SCRIPT CONFIG.yaml [--section.key VALUE ...]"
    [[ -f "$1" ]] || fail "the configuration '$1' does not exist in $PWD on $(hostname); give a path that all nodes see"
}

# A job array is one run a seed: task 3 runs with `--seed 3`, and `{seed}` in its run_dir keeps the runs apart.
seed_of_array_task() {
    seed_arguments=()
    [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]] || return 0
    local config="$1" run_dir
    shift
    run_dir="$(run_dir_in_arguments "$@")"
    [[ -n "$run_dir" ]] || run_dir="$(grep -E '^run_dir[[:space:]]*:' "$config" || true)"
    [[ "$run_dir" == *'{seed}'* ]] || fail "the tasks of a job array would all write to one run_dir;" \
        "put {seed} into it, as in '--run_dir runs/ppo-{seed}', or in $config"
    seed_arguments=(--seed "$SLURM_ARRAY_TASK_ID")
}

# describe_resuming COMMAND CONFIG ARGUMENTS...: a job continues the run that is in its folder, unless the file or an argument (the
# last one counts) says otherwise, or that a run there is to be removed. When it was requeued after its driver had run, it does
# so in any case: that run is its own.
describe_resuming() {
    local command="$1" config="$2"
    shift 2
    resume=()
    case "$command" in
        sft | reward | ppo) ;;
        *) return 0 ;; # a pipeline continues by itself, an evaluation is always run whole
    esac
    grep -qE '^resume[[:space:]]*:' "$config" || overwrites "$config" "$@" || resume=(--resume auto)
    [[ ! -e "$job_dir.ran" ]] || continued=(--resume auto --overwrite false)
}

# overwrites CONFIG ARGUMENTS...: whether `overwrite` is true.
overwrites() {
    local said previous="" argument
    said="$(sed -nE 's/^overwrite[[:space:]]*:[[:space:]]*([^[:space:]]*).*/\1/p' "$1")"
    for argument in "${@:2}"; do
        [[ "$previous" != --overwrite ]] || said="$argument"
        [[ "$argument" != --overwrite=* ]] || said="${argument#*=}"
        previous="$argument"
    done
    said="${said//[\'\"]/}"
    [[ "${said,,}" =~ ^(true|t|yes|y|on|1)$ ]]
}

run_dir_in_arguments() {
    while [[ $# -gt 0 ]]; do
        case "$1" in
            --run_dir=*) printf '%s' "${1#*=}" ;;
            --run_dir) printf '%s' "${2:-}" ;;
        esac
        shift
    done
}

# ------------------------------------------------------------------------------------------------ files of this job

# A private folder that all nodes see: the Ray token, the head's address, and the pipe whose end means "stop".
make_job_dir() {
    # Clusters that share a home directory count their jobs each for itself.
    job_dir="${RLHF_DIST_STATE_DIR:-$HOME/.rlhf_dist/jobs}/${SLURM_CLUSTER_NAME:+$SLURM_CLUSTER_NAME-}$SLURM_JOB_ID"
    rm -rf "$job_dir" # left behind by an earlier start of this job that was killed
    # Beside it, since it outlives the starts of this job: that a driver ran. An earlier job of this number may have left one.
    ((${SLURM_RESTART_COUNT:-0} > 0)) || rm -f "$job_dir.ran"
    (
        umask 077 # here only: what the run writes is the user's to share
        mkdir -p "$job_dir"
        od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$job_dir/token"
        mkfifo "$job_dir/stop"
        : >"$job_dir/ended"
    )

    # The path is exported, never the token. What the user's shell knows of other Ray clusters must not reach this one.
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$job_dir/token" RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
    unset RAY_AUTH_TOKEN RAY_ADDRESS

    # Ray nodes stop when their input ends. This shell alone holds the writing end, so they stop even if it is killed.
    exec {keep_running}<>"$job_dir/stop"
}

# ------------------------------------------------------------------------------------------------------ nodes and steps

list_nodes() {
    local group list node
    for ((group = 0; group < ${SLURM_HET_SIZE:-1}; group++)); do
        list="SLURM_JOB_NODELIST_HET_GROUP_$group"
        while read -r node; do
            nodes+=("$node")
            [[ -z "${SLURM_HET_SIZE:-}" ]] || het_group["$node"]="$group"
        done < <(scontrol show hostnames "${!list:-$SLURM_JOB_NODELIST}")
    done
}

# step NODE COMMAND...: replaces this (sub)shell by a step on a node. All CPUs and GPUs that the job has there, shared with
# the job's other steps (--overlap); srun would tie its one task to one core where Slurm binds tasks (--cpu-bind).
step() {
    local node="$1" group=()
    shift
    [[ -z "${het_group[$node]:-}" ]] || group=(--het-group="${het_group[$node]}")
    exec {keep_running}>&-
    exec srun "${group[@]}" --overlap --nodes=1 --ntasks=1 --nodelist="$node" --export=ALL --mpi=none --cpu-bind=none \
        "${container_options[@]}" "${container_command[@]}" bash "$SLURM_PARTS/in_environment.sh" "$@"
}

# ------------------------------------------------------------------------------------------------------------ Ray

start_ray() {
    start_ray_node "${nodes[0]}" head "$job_dir/address"
    local limit="${RLHF_DIST_START_TIMEOUT:-600}" started="$SECONDS"
    until [[ -s "$job_dir/address" ]]; do
        kill -0 "${ray_steps[${nodes[0]}]}" 2>/dev/null || fail "Ray's head ended on ${nodes[0]}; its last words stand above"
        ((SECONDS - started < limit)) || fail "Ray's head did not start on ${nodes[0]} within $limit s"
        pause
        stop_if_preempted
    done
    head_address="$(<"$job_dir/address")"
    say "Ray's head is at $head_address"
    stop_if_preempted
    local node
    for node in "${nodes[@]:1}"; do
        start_ray_node "$node" worker "$head_address"
    done
}

start_ray_node() {
    local node="$1"
    step "$node" python -m rlhf_dist.distributed.ray.slurm_node "${@:2}" <"$job_dir/stop" &
    ray_steps["$node"]=$!
}

wait_for_nodes() {
    stop_if_preempted
    step "${nodes[0]}" python -m rlhf_dist.distributed.ray.wait_for_nodes --address "$head_address" --ended "$job_dir/ended" \
        --timeout "${RLHF_DIST_START_TIMEOUT:-600}" "${nodes[@]}" </dev/null &
    local waiter=$! node
    driver="$waiter" # what take_down has to end first
    while kill -0 "$waiter" 2>/dev/null; do
        for node in "${nodes[@]}"; do # a step that ended will not come up any more: no need to wait for the limit
            kill -0 "${ray_steps[$node]}" 2>/dev/null || printf '%s\n' "$node" >>"$job_dir/ended"
        done
        pause
    done
    local status=0
    wait_for "$waiter" || status=$?
    driver=""
    stop_if_preempted
    ((status == 0)) || exit "$status"
}

# --------------------------------------------------------------------------------------------------------- driver

run_driver() {
    stop_if_preempted
    say "$*"
    : >"$job_dir.ran"
    step "${nodes[0]}" "$@" </dev/null &
    driver=$!
    driver_status=0
    wait_for "$driver" || driver_status=$?
    driver=""
    say "the driver ended with exit code $driver_status"
}

# Slurm warns this shell alone (--signal=B:USR1@...). srun hands USR1 on to the driver, which checkpoints and ends with 75.
forward_usr1() {
    interrupted=1
    preempted=1
    say "USR1: the job's time is nearly over"
    [[ -z "$driver" ]] || kill -USR1 "$driver" 2>/dev/null || true
}

stop_if_preempted() {
    ((!preempted)) || finish "$PREEMPTED"
}

finish() {
    local status="$1"
    if ((status == ENDED_BY_USR1 && preempted)); then
        status="$PREEMPTED"
        ((${#continued[@]})) || rm -f "$job_dir.ran" # this first driver had begun nothing
    fi
    ((status != ENDED_BY_TERM || !preempted)) || terminated # what is on its way here as well met the driver first
    if ((status == PREEMPTED)); then
        trap - EXIT
        take_down
        requeue
    fi
    # What was lost with a node or killed, Slurm may start again; what is done, or was rejected, it does not.
    ((status > LAST_REFUSAL)) || rm -f "$job_dir.ran"
    exit "$status"
}

# SIGTERM: the job's time is over, or it was cancelled. A run that was warned, and had no time to follow, continues all the same.
terminated() {
    if ((preempted)) && ! cancelled; then
        say "the job's time was over before the run had written its checkpoint, so it continues from an earlier one, or anew:" \
            "warn it earlier (--signal=B:USR1@SECONDS, submit --signal-before-end)"
        requeue # now: Slurm soon kills this shell, too
        exit "$PREEMPTED"
    fi
    exit "$ENDED_BY_TERM"
}

requeue() {
    if cancelled; then
        say "the job was cancelled, so it is not started again"
        return
    fi
    # By its number in the array: the last task's job id is that of the whole array, too.
    local job="$SLURM_JOB_ID"
    [[ -z "${SLURM_ARRAY_TASK_ID:-}" ]] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    say "the run continues when Slurm starts this job again"
    scontrol requeue "$job" || say "Slurm did not requeue the job; submit it again to continue the run"
}

# Whether somebody ended the job. Slurm would requeue such a job, too; like one whose time is over, it is "completing".
cancelled() {
    local summary
    while read -r summary; do # of arrays and heterogeneous jobs, there are several lines
        [[ "$summary " == "JobId=$SLURM_JOB_ID "*" JobState=COMPLETING "* ]] || continue
        [[ "$summary " =~ \ (Reason=TimeLimit\ |PreemptTime=[0-9]) ]] || return 0
    done < <(scontrol show job --oneliner "$SLURM_JOB_ID")
    return 1
}

# ------------------------------------------------------------------------------------------------------- the end

# Every way out of the job leads through here.
take_down() {
    trap '' TERM INT USR1 # what comes now must not stop this
    if [[ -n "$driver" ]]; then
        kill -TERM "$driver" 2>/dev/null || true # srun ends its step
        wait "$driver" 2>/dev/null || true
    fi
    exec {keep_running}>&- # Ray's nodes stop by themselves
    local limit=$((SECONDS + ${RLHF_DIST_STOP_TIMEOUT:-15})) pid
    for pid in "${ray_steps[@]}"; do
        while kill -0 "$pid" 2>/dev/null && ((SECONDS < limit)); do
            pause
        done
        kill -TERM "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    rm -rf "$job_dir"
}

# A child's exit code. `wait` alone also returns when a trapped signal comes.
wait_for() {
    local status
    while :; do
        interrupted=0 status=0
        wait "$1" || status=$?
        ((interrupted)) || return "$status"
    done
}

# A moment that a signal can end, unlike `sleep` in the foreground.
pause() {
    sleep 0.5 &
    wait $! || true
}
