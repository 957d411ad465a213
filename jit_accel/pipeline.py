"""The place where pipeline folders of version 0.1.0 look for `JiTPipeline`."""

from jit_accel.model.pipeline import JiTPipeline

__all__ = ["JiTPipeline"]
