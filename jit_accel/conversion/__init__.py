"""Between the paper's checkpoints, pipeline folders and safetensors files: see `jit_accel.convert`."""
