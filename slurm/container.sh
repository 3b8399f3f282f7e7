# The container of a job's steps, where there is one; sourced by run.sh.
# shellcheck shell=bash

# describe_container JOB_DIR: RLHF_DIST_CONTAINER → options of srun (Pyxis), or a command before the command (Apptainer).
# shellcheck disable=SC2034 # what it sets is read by run.sh
describe_container() {
    container_options=()
    container_command=()
    local image="${RLHF_DIST_CONTAINER:-}" mounts
    mounts="$1,$SLURM_PARTS,$PWD${RLHF_DIST_MOUNTS:+,$RLHF_DIST_MOUNTS}"
    case "$image" in
        '') ;;
        pyxis:*) container_options=(--container-image="${image#pyxis:}" --container-mounts="$(pyxis_mounts "$mounts")"
            --container-workdir="$PWD") ;;
        docker://* | *.sif)
            [[ "$image" == docker://* || -f "$image" ]] ||
                fail "RLHF_DIST_CONTAINER is '$image', but there is no such file on $(hostname)"
            command -v apptainer >/dev/null ||
                fail "RLHF_DIST_CONTAINER is '$image', but there is no 'apptainer' on $(hostname); load its module first"
            container_command=(bash "$SLURM_PARTS/in_apptainer.sh" --bind "$mounts" --pwd "$PWD" "$image")
            ;;
        *) fail "RLHF_DIST_CONTAINER is '$image', but must be an existing .sif file, docker://IMAGE, or pyxis:IMAGE" ;;
    esac
}

# Pyxis wants SOURCE:TARGET of each mount.
pyxis_mounts() {
    local mount mounts=() IFS=,
    for mount in $1; do
        [[ "$mount" == *:* ]] && mounts+=("$mount") || mounts+=("$mount:$mount")
    done
    printf '%s' "${mounts[*]}"
}
