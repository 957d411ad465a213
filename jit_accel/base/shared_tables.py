"""Tables that the first process of a machine makes, and all processes there map into memory, where they lie once."""

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from accelerate.utils import gather_object

from jit_accel.base.files import atomic_file, remove_leftovers

_NAME = "jit_accel_tables"
_folder: Path | None = None  # of the tables that are shared now, in this process
_is_first = False


@contextlib.contextmanager
def tables_shared(accelerator) -> Iterator[None]:
    """Let `shared_table` share in the block, which all processes enter, those that are first on a machine ahead.

    None may leave before all have their tables: the files lose their names then, and their room on the disk when the
    last process that maps them ends.
    """
    global _folder, _is_first
    _is_first = accelerator.is_local_main_process
    mine = _new_folder() if _is_first else None
    found = [path for host, path in gather_object([(socket.gethostname(), mine)]) if host == socket.gethostname()]
    _folder = mine or next((path for path in found if path and path.is_dir()), None)
    try:
        yield
    finally:
        _folder = None
        if mine:
            shutil.rmtree(mine, ignore_errors=True)


def _new_folder() -> Path | None:
    try:
        remove_leftovers(Path(tempfile.gettempdir()), _NAME)  # of processes that were killed
        return Path(tempfile.mkdtemp(prefix=f".{_NAME}.", suffix=f".{os.getpid()}.tmp"))
    except OSError:
        return None


def shared_table(name: str, make: Callable[[], pa.Table]) -> pa.Table:
    """Return what `make` returns, which the table of this name follows from; it raises in each process what it raises.

    Where tables are shared the first process calls it, and the others where they do not find the first one's.
    """
    if _folder is None:
        return make()
    file = _folder / hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    made = make() if _is_first or not file.exists() else None
    try:
        if made is not None and _is_first:
            _write(file, made)
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except OSError:  # no room for it
        return make() if made is None else made
    finally:
        del made
        pa.default_memory_pool().release_unused()


def _write(file: Path, table: pa.Table) -> None:
    with atomic_file(file, durable=False) as path, pa.OSFile(str(path), "wb") as sink:
        writer = pa.ipc.new_file(sink, table.schema)
        writer.write_table(table)
        writer.close()


def shared_arrays(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return arrays, each (n,) of numbers, as `shared_table` returns tables; they are read-only."""

    def table() -> pa.Table:
        lists = {key: pa.LargeListArray.from_arrays([0, len(array)], array) for key, array in make().items()}
        return pa.table(lists)

    found = shared_table(name, table)
    return {key: found[key].chunk(0).values.to_numpy() for key in found.column_names}
