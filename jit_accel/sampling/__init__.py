"""Images by the thousand from a trained model, shared by all processes: see `jit_accel.sample`."""
