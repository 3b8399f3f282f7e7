#!/usr/bin/env bash
# ray_node.sh head ADDRESS_FILE | worker HEAD_ADDRESS: Ray on this node, until standard input ends.
#
# No port is fixed, so that jobs which share a node do not meet: Ray takes free ones, and the head writes down its own. Only
# the port of Ray's client server, which nobody uses here and which cannot be switched off, has to be given.
set -euo pipefail

role="$1" head="$2"
node="${SLURMD_NODENAME:-$HOSTNAME}"

fail() {
    printf 'error: %s: %s\n' "$node" "$*" >&2
    exit 2
}

# Unix sockets lie below this folder, and their paths may not be longer than 107 bytes; Ray needs about 75 of them.
temp_dir="${RLHF_DIST_RAY_TMPDIR:-/tmp}/rlhf-$SLURM_JOB_ID-$node"
((${#temp_dir} <= 40)) || temp_dir="${RLHF_DIST_RAY_TMPDIR:-/tmp}/rlhf-$SLURM_JOB_ID-$SLURM_NODEID"
((${#temp_dir} <= 40)) || fail "Ray's folder $temp_dir is longer than 40 bytes; set RLHF_DIST_RAY_TMPDIR to a shorter one"
umask 077
rm -rf "$temp_dir"
mkdir -p "$temp_dir"

options=(--node-name="$node" --labels="slurm-node=$node" --temp-dir="$temp_dir" --disable-usage-stats
    --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")
towards=()
case "$role" in
    head)
        client_port="$(python -m rlhf_dist.cluster.address --free-port "$SLURM_JOB_ID")"
        options+=(--head --port=0 --ray-client-server-port="$client_port" --include-dashboard=false)
        ;;
    worker) options+=(--address="$head") towards=(--towards "${head%:*}") ;;
    *) fail "the role is '$role', but must be head or worker" ;;
esac
if [[ -n "${RLHF_DIST_INTERFACE:-}" ]]; then
    towards+=(--interface "$RLHF_DIST_INTERFACE")
    export GLOO_SOCKET_IFNAME="$RLHF_DIST_INTERFACE" NCCL_SOCKET_IFNAME="$RLHF_DIST_INTERFACE"
fi
options+=(--node-ip-address="$(python -m rlhf_dist.cluster.address "${towards[@]}")")
# Split on purpose: several arguments in one variable.
# shellcheck disable=SC2206
options+=(${RLHF_DIST_RAY_ARGUMENTS:-})

stop=0
trap 'stop=1' TERM INT
ray start "${options[@]}" --block >"$temp_dir/start.log" 2>&1 </dev/null &
ray=$!

# `read` ends with 1 when the input does, with more than 128 when the second is over.
while ((!stop)) && kill -0 "$ray" 2>/dev/null; do
    if [[ "$role" == head && ! -e "$head" && -s "$temp_dir/ray_current_cluster" ]]; then
        cp "$temp_dir/ray_current_cluster" "$head.new"
        mv "$head.new" "$head"
    fi
    status=0
    read -r -t 1 || status=$?
    ((status != 1)) || stop=1
done

if ((stop)); then
    kill -TERM "$ray" 2>/dev/null || true
    wait "$ray" || true
    rm -rf "$temp_dir"
    exit 0
fi
wait "$ray" && status=0 || status=$?
tail -n 20 "$temp_dir/start.log" >&2
rm -rf "$temp_dir"
fail "Ray ended with exit code $status"
