#!/usr/bin/env bash
# From nothing to pictures: sets everything up, trains a small JiT on Fashion-MNIST (three to eight minutes on two CPU
# cores, seconds on a GPU), and ends by naming the sample sheet, the loss curve and the pipeline folder.
#   bash launch/quickstart.sh
# The same command again goes on where it was stopped, or names the files of the finished run. Arguments go to
# jit_accel.train:
#   bash launch/quickstart.sh --max_steps 2000 --wandb_name quickstart_longer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
set_up

export OMP_WAIT_POLICY=passive # threads that have nothing to do leave the core to the others

# Without `accelerate launch`, which would set one thread and float32: one device chooses for itself.
# The name makes the folder, runs/quickstart; what stands behind the last -- wins over what stands before it.
python -m jit_accel.train --config launch/recipes/quickstart.yaml --wandb_name quickstart --resume auto -- "$@"
