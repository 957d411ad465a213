"""The place where pipeline folders of version 0.1.0 look for `JiTScheduler`, and diffusers for its base."""

from jit_accel.model.scheduler import JiTScheduler, SchedulerMixin

__all__ = ["JiTScheduler", "SchedulerMixin"]
