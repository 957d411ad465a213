"""What a run says on the terminal or into a log file; where that cannot be written, the run goes on in silence."""

from __future__ import annotations

import contextlib
import os
import sys

from tqdm.auto import tqdm

from jit_accel.base.redaction import redacted


def say(message: str, file=None) -> None:
    """Print a line without secrets, above a progress bar if there is one."""
    file = file or sys.stdout
    message = redacted(message)
    try:
        try:
            tqdm.write(message, file=file)
        except UnicodeEncodeError:
            tqdm.write(message.encode(file.encoding, "replace").decode(file.encoding), file=file)
        file.flush()
    except (OSError, ValueError):
        _hush(file)


def warn(message: str) -> None:
    say(f"Warning: {message}", sys.stderr)


def _hush(file) -> None:
    """Send what follows nowhere: what is left in the file's buffer would fail again when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)
