"""What a disturbed training does otherwise than a real one: its disk is slow, and its watch quick."""

import json
import os
import random
import time

import helpers
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from jit_accel.base import folder_lock, watchdog
from jit_accel.train import feed

SLOWEST_SYNC_S = 0.008


def prepare() -> None:
    """Make saves last a while, so that some faults fall into them, silence be noticed soon, and validation be short."""
    chance = random.Random(os.getpid())
    os.fsync = lambda descriptor: time.sleep(chance.uniform(0, SLOWEST_SYNC_S))
    watchdog.BEAT_S, folder_lock.SILENT_S, folder_lock.HEARTBEAT_S = 0.2, 3.0, 0.5
    feed.MIN_DRAWS = 8


def train(flags: list[str], environment: dict[str, str], log: str) -> None:
    """Train as one of the processes that an agent has started, to which a result says that all went well."""
    if code := helpers.run_program(flags, environment, log):
        os._exit(code)


def launch(flags: list[str]) -> int:
    """Start the processes as torchrun does, by its agent, but forked from this one. Returns the exit code."""
    started = json.loads(os.environ["TEST_LAUNCHED"])
    del os.environ["TEST_MAIN"]
    config = LaunchConfig(
        *(1, 1, started["count"]),
        run_id=str(os.getpid()),
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{helpers.free_port()}",
        rdzv_configs={"rank": 0, "timeout": 60},
        max_restarts=0,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=started["log"] + ".d"),
    )
    try:
        elastic_launch(config, train)(flags, started["environment"], started["log"])
    except ChildFailedError:
        return 1
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0
