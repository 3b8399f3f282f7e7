#!/usr/bin/env bash
# in_environment.sh COMMAND...: run a command on a node, in the container if there is one, in the user's environment.
#
# RLHF_DIST_ACTIVATE is a file to source (a virtual environment's bin/activate) or a line of shell ("module load ...").
set -eo pipefail # not -u: many activation scripts read variables that are not set

if [[ -f "${RLHF_DIST_ACTIVATE:-}" ]]; then
    # shellcheck source=/dev/null
    source "$RLHF_DIST_ACTIVATE"
elif [[ -n "${RLHF_DIST_ACTIVATE:-}" ]]; then
    eval "$RLHF_DIST_ACTIVATE"
fi
command -v "$1" >/dev/null || {
    printf "error: there is no '%s' on %s; set RLHF_DIST_ACTIVATE to a file or line that activates the environment\n" \
        "$1" "${SLURMD_NODENAME:-$HOSTNAME}" >&2
    exit 2
}
exec "$@"
