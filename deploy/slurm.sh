#!/usr/bin/env bash
# Slurm: `sbatch deploy/slurm.sh`. Ray starts on every node of the allocation, the run on the first, and all ends with it.
# A run that was requeued, or is submitted again, goes on where it was: what it knows is in its folder, which all nodes see.
# docs/deploying.md says more.
#
# Change: the #SBATCH lines, RECIPE, RUN and RUNS, which may be given as well: `RUN=mine sbatch deploy/slurm.sh`.
# Once, in a checkout on a file system that all nodes see: make .venv/installed; ray get-auth-token --generate
# Plan it, with what a node has and how many there are:
#
#   kto-ray plan sd15_lora --nodes 2x32CPU,4GPU --images-per-s 1 --samples-per-s 8
#
# Nodes should be one's own: at its end symmetric-run calls `ray stop`, which ends every Ray of this user on the node.
# Authentication: the token of ~/.ray/auth_token, which all nodes see in the home folder. TLS=1 encrypts and authenticates
# what nodes say to each other (deploy/tls.sh); do so where others work on the same network.
#SBATCH --job-name=kto-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=kto-ray-%j.log
set -euo pipefail
RECIPE=${RECIPE:-sd15_lora}
RUN=${RUN:-sd15}
CHECKOUT=${CHECKOUT:-${SLURM_SUBMIT_DIR:-$PWD}}
RUNS=${RUNS:-$CHECKOUT/runs}
PORT=${PORT:-6379}

cd "$CHECKOUT"
export PATH="$CHECKOUT/.venv/bin:$PATH"
export KTO_RAY_ENVS="${KTO_RAY_ENVS:-$CHECKOUT/.envs}"
export RAY_AUTH_MODE=token
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
if [ "${TLS:-0}" = 1 ]; then
    authority=$HOME/.ray/tls
    [ -f "$authority/ca.key" ] || deploy/tls.sh authority "$authority"
    here=${TMPDIR:-/tmp}/kto-ray-tls-$SLURM_JOB_ID
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 deploy/tls.sh node "$authority" "$here"
    export RAY_USE_TLS=1 RAY_TLS_CA_CERT=$here/ca.crt RAY_TLS_SERVER_CERT=$here/node.crt RAY_TLS_SERVER_KEY=$here/node.key
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# `hostname --ip-address` is loopback on many systems. Of several networks, HEAD_IP names the one to use.
address=${HEAD_IP:-$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --all-ip-addresses | awk '{print $1}')}:$PORT
# symmetric-run ends well, too, where Ray could not be started: a run that has ended well leaves a file.
ended=$CHECKOUT/.kto-ray-$SLURM_JOB_ID
# shellcheck disable=SC2016  # the inner bash expands it
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "${SLURM_CPUS_PER_TASK:-1}" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats -- \
    bash -c '"${@:2}" && touch "$1"' run "$ended" \
    python jobs/online_kto.py --recipe "$RECIPE" "run=$RUN" "runs_folder=$RUNS" "cluster.address=$address" "$@"
[ -e "$ended" ] || { echo "Ray was not started, or the run did not end well: see above" >&2; exit 1; }
rm "$ended"
