#!/usr/bin/env bash
# Train on several nodes. Run it once on each node, with the same settings but for MACHINE_RANK:
#   MACHINE_RANK=0 MAIN_PROCESS_IP=10.0.0.1 bash launch/multi_node.sh    # on the first node, 10.0.0.1
#   MACHINE_RANK=1 MAIN_PROCESS_IP=10.0.0.1 bash launch/multi_node.sh    # on the second
#
# Under SLURM, one task a node; the ranks and the number of nodes come from SLURM's own variables:
#   #SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#   #SBATCH --signal=TERM@300 --requeue   # a checkpoint five minutes before the time limit
#   export MAIN_PROCESS_IP="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
#   export OUTPUT_DIR=/mnt/runs/imagenet256_b16
#   srun bash launch/multi_node.sh || true   # the launcher says 1 even after a clean stop, so look for the marker:
#   if [ -e "$OUTPUT_DIR/INTERRUPTED" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
#
# Anything behind the script's name goes to jit_accel.train, and wins over the settings and the recipe.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$HERE/common.sh"
use_environment # .venv if it is there, else what is active; on every node at the same path

# --- nodes
NUM_MACHINES="${NUM_MACHINES:-${SLURM_JOB_NUM_NODES:-2}}"
GPUS_PER_NODE="${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
MACHINE_RANK="${MACHINE_RANK:-${SLURM_NODEID:-0}}"        # 0 on the first node, 1 on the second, ...
MAIN_PROCESS_IP="${MAIN_PROCESS_IP:-127.0.0.1}"           # address of node 0, reachable from the others
MAIN_PROCESS_PORT="${MAIN_PROCESS_PORT:-29500}"           # a free port there
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-$HERE/../accelerate_configs/multi_node.yaml}"  # the same file on all nodes

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
exec accelerate launch --config_file "$ACCELERATE_CONFIG" \
  --num_machines "$NUM_MACHINES" --num_processes "$((NUM_MACHINES * GPUS_PER_NODE))" \
  --machine_rank "$MACHINE_RANK" --main_process_ip "$MAIN_PROCESS_IP" --main_process_port "$MAIN_PROCESS_PORT" \
  -m jit_accel.train --config="$RECIPE" --data_path="$DATA_PATH" --batch_size="$BATCH_SIZE" \
  ${OUTPUT_DIR:+--output_dir="$OUTPUT_DIR"} --resume=auto \
  --use_wandb="$USE_WANDB" --wandb_project="$WANDB_PROJECT" --wandb_name="$WANDB_NAME" -- "$@"
