#!/usr/bin/env bash
# Train on several nodes. Run it once on each node, with the same settings but for MACHINE_RANK:
#   MACHINE_RANK=0 MAIN_PROCESS_IP=10.0.0.1 bash launch/multi_node.sh    # on the first node, 10.0.0.1
#   MACHINE_RANK=1 MAIN_PROCESS_IP=10.0.0.1 bash launch/multi_node.sh    # on the second
# Under a scheduler ranks and addresses come from its variables: launch/slurm.sbatch, jobset.yaml and skypilot.yaml.
#
# Where a process, a launcher or a node is lost, all start again from the newest checkpoint; a node that comes back runs
# this script again. Two restarts without a newer checkpoint end the run. To stop it, signal this script on each node.
#
# Anything behind the script's name goes to jit_accel.train, and wins over the settings and the recipe.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$HERE/common.sh"
use_environment # .venv if it is there, else what is active; on every node at the same path

# --- nodes
NUM_MACHINES="${NUM_MACHINES:-${SLURM_JOB_NUM_NODES:-${SKYPILOT_NUM_NODES:-2}}}"
GPUS_PER_NODE="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-${SKYPILOT_NUM_GPUS_PER_NODE:-8}}}"
MACHINE_RANK="${MACHINE_RANK:-${SLURM_NODEID:-${SKYPILOT_NODE_RANK:-${JOB_COMPLETION_INDEX:-0}}}}"  # 0 on the first node
FIRST_IP="${SKYPILOT_NODE_IPS:-127.0.0.1}"                # one a line
MAIN_PROCESS_IP="${MAIN_PROCESS_IP:-${FIRST_IP%%$'\n'*}}"  # address of node 0, reachable from the others
MAIN_PROCESS_PORT="${MAIN_PROCESS_PORT:-29500}"           # a free port there
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-$HERE/../accelerate_configs/multi_node.yaml}"  # the same file on all nodes

WAIT_MINUTES="${WAIT_MINUTES:-60}"                        # how long a start waits for the other nodes

# --- run
RECIPE="${RECIPE:-$HERE/recipes/imagenet256_b16.yaml}"    # see launch/recipes
DATA_PATH="${DATA_PATH:-./data/train}"                    # the same images on every node
BATCH_SIZE="${BATCH_SIZE:-64}"                            # per GPU; 2 nodes x 8 GPUs x 64 = the paper's 1024

# --- name and place
OUTPUT_DIR="${OUTPUT_DIR:-}"                              # on a file system that all nodes share; empty = runs/NAME
WANDB_NAME="${WANDB_NAME:-$(basename "${OUTPUT_DIR:-${WANDB_RUN_ID:-multi_node}}")}"  # name of this run

# --- Weights & Biases
USE_WANDB="${USE_WANDB:-false}"                           # true or false; only the main process logs
WANDB_PROJECT="${WANDB_PROJECT:-jit-diffusion}"           # WANDB_ENTITY, WANDB_TAGS ("a,b") and WANDB_NOTES are read
                                                          # by wandb itself where they are exported

# Seconds that a stopped run has for its checkpoint (torchrun's default is 30).
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-240}"
# What it passes on to the training; schedulers send SIGUSR1 or SIGUSR2 before they end a job.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}"

# What stands behind the last -- wins over what stands before it.
exec python -m jit_accel.supervise \
  accelerate launch --config_file "$ACCELERATE_CONFIG" --rdzv_conf timeout="$((60 * WAIT_MINUTES))" \
  --num_machines "$NUM_MACHINES" --num_processes "$((NUM_MACHINES * GPUS_PER_NODE))" \
  --machine_rank "$MACHINE_RANK" --main_process_ip "$MAIN_PROCESS_IP" --main_process_port "$MAIN_PROCESS_PORT" \
  -m jit_accel.train --config="$RECIPE" --data_path="$DATA_PATH" --batch_size="$BATCH_SIZE" \
  ${OUTPUT_DIR:+--output_dir="$OUTPUT_DIR"} --resume=auto \
  --use_wandb="$USE_WANDB" --wandb_project="$WANDB_PROJECT" --wandb_name="$WANDB_NAME" -- "$@"
