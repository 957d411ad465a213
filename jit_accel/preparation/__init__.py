"""Turning any source of images into training shards, once: see `jit_accel.prepare`."""
