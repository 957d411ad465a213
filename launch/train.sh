#!/usr/bin/env bash
# Train a JiT on your own images. Change the settings here, or set them for one run:
#   DATA_PATH=~/flowers EPOCHS=400 bash launch/train.sh
# Anything behind the script's name goes to jit_accel.train, and wins over the settings, a --config FILE too:
#   DATA_PATH=~/digits bash launch/train.sh --no_horizontal_flip --max_steps 20000
# The same command again continues where the last one stopped. Another WANDB_NAME is another run, in a folder of its own.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$HERE/common.sh"
use_environment # .venv if it is there, else what is active

# --- data
DATA_PATH="${DATA_PATH:-./data/train}"  # folder of class folders, flat folder, Parquet, WebDataset, Hub id, builtin:NAME
IMG_SIZE="${IMG_SIZE:-64}"              # side of the square images in pixels; a multiple of the model's patch

# --- model
MODEL="${MODEL:-JiT-B/4}"               # JiT-{Ti,S,B,L,H,G}/PATCH; 16 patches a side as in the paper: 64 px /4, 256 px /16

# --- length and speed
BATCH_SIZE="${BATCH_SIZE:-32}"          # images per process and micro-step
ACCUMULATION="${ACCUMULATION:-1}"       # micro-steps per step; global batch = BATCH_SIZE x processes x ACCUMULATION
EPOCHS="${EPOCHS:-100}"                 # passes over the data
LEARNING_RATE="${LEARNING_RATE:-None}"  # None = 3e-4 for short runs, the paper's 5e-5 x global batch / 256 for long ones

# --- name and place
WANDB_NAME="${WANDB_NAME:-${WANDB_RUN_ID:-jit-v1-bs32}}"  # name of this run, also without Weights & Biases
OUTPUT_DIR="${OUTPUT_DIR:-}"            # checkpoints, samples, pipeline folder; empty = runs/ and the name

# --- Weights & Biases
USE_WANDB="${USE_WANDB:-false}"         # true or false; WANDB_MODE=offline works without a network
WANDB_PROJECT="${WANDB_PROJECT:-jit-diffusion}"
WANDB_ENTITY="${WANDB_ENTITY:-}"        # team or user; empty = your login's
WANDB_TAGS="${WANDB_TAGS:-}"            # tags to filter runs by, with commas: "faces, small"
WANDB_NOTES="${WANDB_NOTES:-}"          # a longer description of the run
WANDB_GROUP="${WANDB_GROUP:-}"          # runs of one group are shown together, such as the seeds of one setting

# --- hardware: single_gpu.yaml, multi_gpu.yaml, fsdp2.yaml, or single_device.yaml for a machine without a GPU
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-$HERE/../accelerate_configs/single_gpu.yaml}"
NUM_PROCESSES="${NUM_PROCESSES:-}"      # GPUs to use; empty = what the file says

# What stands behind the last -- wins over what stands before it.
exec accelerate launch --quiet --config_file "$ACCELERATE_CONFIG" ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} \
  -m jit_accel.train --data_path="$DATA_PATH" --img_size="$IMG_SIZE" --model="$MODEL" \
  --batch_size="$BATCH_SIZE" --gradient_accumulation_steps="$ACCUMULATION" \
  --epochs="$EPOCHS" --learning_rate="$LEARNING_RATE" ${OUTPUT_DIR:+--output_dir="$OUTPUT_DIR"} --resume=auto \
  --use_wandb="$USE_WANDB" --wandb_project="$WANDB_PROJECT" --wandb_name="$WANDB_NAME" --wandb_tags="$WANDB_TAGS" \
  ${WANDB_ENTITY:+--wandb_entity="$WANDB_ENTITY"} ${WANDB_NOTES:+--wandb_notes="$WANDB_NOTES"} \
  ${WANDB_GROUP:+--wandb_group="$WANDB_GROUP"} -- "$@"
