"""`python -m jit_accel.prepare` can be interrupted and told nonsense."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import SPAWNER
from prepare_samples import SIZE, Prepared, contents, make_sources, picture, prepare

from jit_accel.base.errors import UserError
from jit_accel.data.formats.prepared import read_index
from jit_accel.data.formats.sources import open_images
from jit_accel.data.reading.images import TableImages
from jit_accel.prepare import main
from jit_accel.prepare.encode import Original, encode
from jit_accel.prepare.output import OutputFolder
from jit_accel.prepare.settings import PrepareConfig


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def prepared(sources, tmp_path_factory) -> Prepared:
    return Prepared(sources, tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def refused(capsys):
    """Prepare with these flags; the error, after checking that it is one."""

    def run(*flags: object) -> str:
        assert main([str(flag) for flag in flags]) == 2
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err + printed.out
        return next(line for line in printed.err.splitlines() if line.startswith("error: "))

    return run


# --- interruption


def _slowly(flags: list[str], slow: str) -> None:
    """In a process: prepare with 20 ms an image in one of the stages."""
    os.setsid()
    import jit_accel.prepare.encode as stage

    images_at = stage.Spool.images_at

    def slow_encode(*args):
        time.sleep(0.02)
        return encode(*args)

    def slow_images_at(*args):
        for image in images_at(*args):
            time.sleep(0.02)
            yield image

    if slow == "encode":
        stage.encode = slow_encode
    else:
        stage.Spool.images_at = slow_images_at
    os._exit(main(flags))


def interrupted(flags: list[str], slow: str, output: Path, pattern: str, number: int, group: bool) -> int:
    """Prepare slowly, and send the signal when two files of this pattern are there; the exit code."""
    process = SPAWNER.Process(target=_slowly, args=(flags, slow))
    process.start()
    deadline = time.monotonic() + 120
    while len(list((output / ".unfinished").glob(pattern))) < 2:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    (os.killpg if group else os.kill)(process.pid, number)
    process.join(240)
    return process.exitcode


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("kind", "slow", "pattern", "number", "group"),
    [
        ("folder", "encode", "shard-*.json", signal.SIGKILL, True),
        ("folder", "encode", "shard-*.json", signal.SIGKILL, False),  # the workers must notice
        ("folder", "encode", "shard-*.json", signal.SIGTERM, True),
        ("parquet", "encode", "spool/*.arrow", signal.SIGKILL, True),
        ("parquet", "encode", "spool/*.arrow", signal.SIGTERM, False),
        ("parquet", "images_at", "shard-*.json", signal.SIGKILL, True),
        ("parquet", "images_at", "shard-*.json", signal.SIGINT, True),
    ],
)
def test_after_an_interruption_the_same_command_goes_on(
    sources, prepared, tmp_path, kind, slow, pattern, number, group
):
    output, format = tmp_path / "out", "uint8" if kind == "folder" else "jpeg"
    flags = ["--data_path", str(sources[kind]), "--output_dir", str(output), "--img_size", str(SIZE)]
    flags += ["--shard_images", "9", "--num_workers", "2", "--format", format]
    code = interrupted(flags, slow, output, pattern, number, group)
    assert code == (-9 if number == signal.SIGKILL else 128 + number)
    assert [path.name for path in output.iterdir()] == [".unfinished"]
    with pytest.raises(UserError, match="preparation was not finished"):
        open_images(output)
    made = {path: path.stat().st_mtime_ns for path in (output / ".unfinished").glob(pattern)}
    assert len(made) >= 2

    calls = []

    class Watched(OutputWatch):
        seen = calls

    with Watched(output / ".unfinished", pattern):
        assert main(flags) == 0
    assert made.items() <= dict(calls).items()
    assert contents(output) == contents(prepared(kind, format))


class OutputWatch:
    """Notes the files of an unfinished store just before they are published."""

    seen: list

    def __init__(self, folder: Path, pattern: str):
        self.folder, self.pattern = folder, pattern

    def __enter__(self):
        from jit_accel.prepare.output import OutputFolder

        self.publish = OutputFolder.publish

        def publish(output, names):
            self.seen += [(path, path.stat().st_mtime_ns) for path in self.folder.glob(self.pattern)]
            self.publish(output, names)

        OutputFolder.publish = publish

    def __exit__(self, *exception):
        from jit_accel.prepare.output import OutputFolder

        OutputFolder.publish = self.publish


def test_a_killed_worker_is_reported_and_costs_only_its_shard(refused, sources, tmp_path, monkeypatch):
    def fatal_encode(original, *args):
        if original.name.endswith("033.jpg"):
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(original, *args)

    flags = ("--data_path", sources["folder"], "--output_dir", tmp_path / "out", "--img_size", SIZE)
    flags = (*flags, "--shard_images", "9", "--num_workers", "1")
    with monkeypatch.context() as patch:
        patch.setattr("jit_accel.prepare.encode.encode", fatal_encode)
        assert "a process was killed, most likely because the memory was full" in refused(*flags)
    prepare(sources["folder"], tmp_path / "out")


def test_two_processes_do_not_write_one_folder(refused, sources, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr("jit_accel.prepare.output._LOCK_PATIENCE_S", 0)
    (tmp_path / "out" / ".unfinished").mkdir(parents=True)
    with open(tmp_path / "out" / ".unfinished" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = refused("--data_path", sources["folder"], "--output_dir", tmp_path / "out", "--img_size", SIZE)
    assert "another process is preparing images there" in message
    prepare(sources["folder"], tmp_path / "out")


def test_who_waited_finds_the_store_finished(prepared, tmp_path, monkeypatch):
    """The work folder is gone by the time that it gets the lock: it may be between any two of its steps."""
    monkeypatch.setattr("jit_accel.prepare.output._LOCK_PATIENCE_S", 120)
    made = prepared("folder", "uint8")
    index = read_index(made)
    recorded = index["settings"]
    output = OutputFolder(str(tmp_path / "out"))
    first = output.begun(recorded)
    assert first.__enter__() is None
    found, begun = [], threading.Event()

    def wait() -> None:
        begun.set()
        with OutputFolder(str(tmp_path / "out")).begun(recorded) as index:
            found.append(index)

    waiting = [threading.Thread(target=wait) for _ in range(2)]
    for thread in waiting:
        thread.start()
    assert begun.wait(10)
    time.sleep(0.15)  # it has the lock file open
    shutil.copytree(made, output.path, dirs_exist_ok=True)
    first.__exit__(None, None, None)
    for thread in waiting:
        thread.join()
    assert found == [index, index]
    assert contents(output.path) == contents(made)


def test_a_work_folder_that_goes_away_while_it_is_looked_at_is_made_again(tmp_path, monkeypatch):
    output, seen = OutputFolder(str(tmp_path / "out")), []
    output.work.mkdir(parents=True)
    real = Path.is_dir

    def is_dir_no_more(path):
        if path == output.work and not seen:
            seen.append(path.rmdir())
        return real(path)

    monkeypatch.setattr(Path, "is_dir", is_dir_no_more)
    with output.begun({"img_size": SIZE}):
        assert seen
        assert (output.work / "plan.json").is_file()


def test_a_work_folder_that_goes_away_before_its_lock_is_there_is_made_again(tmp_path, monkeypatch):
    output, opened = OutputFolder(str(tmp_path / "out")), []
    real = os.open

    def open_late(file, *args, **kwargs):
        if str(file).endswith("lock") and not opened:
            opened.append(file)
            os.rmdir(output.work)
        return real(file, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_late)
    with output.begun({"img_size": SIZE}) as index:
        assert index is None
        assert (output.work / "plan.json").is_file()
    assert opened


@pytest.mark.multiprocess
def test_three_at_once_make_one_store(sources, tmp_path):
    flags = ["--data_path", str(sources["folder"]), "--output_dir", str(tmp_path / "out"), "--img_size", str(SIZE)]
    processes = [SPAWNER.Process(target=_prepare, args=([*flags, "--num_workers", "1"],)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not (tmp_path / "out" / ".unfinished").exists()
    assert len(open_images(tmp_path / "out").images) == 58


def _prepare(flags: list[str]) -> None:
    """In a process that waits for the others however busy the machine is."""
    import jit_accel.prepare.output as stage

    stage._LOCK_PATIENCE_S = 240
    os._exit(main(flags))


def test_files_that_were_overwritten_are_other_images(refused, sources, tmp_path, capsys):
    shutil.copytree(sources["folder"], tmp_path / "data")
    out = tmp_path / "out"
    prepare(tmp_path / "data", out)
    shutil.move(tmp_path / "data", tmp_path / "moved")  # which the store outlives
    prepare(tmp_path / "moved", out)
    assert "is finished already: 58 images of 16 px, 3 classes" in capsys.readouterr().out
    next((tmp_path / "moved").rglob("*.jpg")).write_bytes(picture(99) + b"more")
    message = refused("--data_path", tmp_path / "moved", "--output_dir", out, "--img_size", SIZE, "--shard_images", 9)
    assert "the images of --data_path changed" in message


def test_running_again_changes_nothing(sources, tmp_path, capsys):
    prepare(sources["folder"], tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    prepare(sources["folder"], tmp_path / "out", "--num_workers", "1")
    assert "is finished already: 58 images of 16 px, 3 classes" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# --- bad input


def test_help_needs_neither_torch_nor_datasets():
    code = "import sys, jit_accel.prepare as p; p.parse_args(['--verify', 'x']); "
    code += "print({'torch', 'datasets'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_an_image_without_a_label_is_left_out():
    encoded = encode(Original(picture(0), "0.jpg", -1, None), PrepareConfig(), "")
    assert (encoded.data, encoded.reason) == (None, "it has no label")


def test_wrong_flags(refused, sources, tmp_path):
    folder = ("--data_path", sources["folder"], "--output_dir", tmp_path / "out")
    assert "--data_path: not given" in refused("--output_dir", tmp_path)
    assert "--output_dir: not given" in refused("--data_path", tmp_path)
    assert "--img_size 0: must be at least 1" in refused(*folder, "--img_size", "0")
    assert "--quality 90: --format png has none" in refused(*folder, "--format", "png", "--quality", "90")
    assert "--quality 101: must be from 1 to 100" in refused(*folder, "--format", "jpeg", "--quality", "101")
    assert "--seed -1: must be 0 or more" in refused(*folder, "--seed=-1")
    assert "--seed 1" in refused(*folder, f"--seed={10**30}")
    assert "--num_workers 9999: must be at least 1 and at most 1,024" in refused(*folder, "--num_workers=9999")
    assert "--verify: " in refused("--verify", tmp_path, *folder)
    assert f"--data_path {tmp_path}/none: no such file" in refused("--data_path", f"{tmp_path}/none", *folder[2:])
    assert "--label_column x: " in refused(*folder, "--label_column", "x")
    assert not (tmp_path / "out").exists()
    assert "--formt: no such flag. Did you mean '--format'?" in refused(*folder, "--formt")
    with pytest.raises(SystemExit) as exit:
        main([*map(str, folder), "--format=gif"])
    assert exit.value.code == 2


def test_output_folders_that_cannot_be_used(refused, sources, tmp_path):
    source = ("--data_path", sources["folder"])
    for inside in (sources["folder"], sources["folder"] / "new", sources["folder"] / "ant" / ".." / "x"):
        assert "lies inside --data_path" in refused(*source, "--output_dir", inside)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert "is not empty (thesis.txt, ...)" in refused(*source, "--output_dir", tmp_path / "mine")
    thesis = tmp_path / "mine" / "thesis.txt"
    assert "is a file: choose a new folder" in refused(*source, "--output_dir", thesis)
    assert "cannot be written (Not a directory)" in refused(*source, "--output_dir", thesis / "out")
    assert contents(tmp_path) == {"thesis.txt": b"all of it"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk(refused, sources, tmp_path, monkeypatch):
    def write_header(file, *shape):
        with open("/dev/full", "wb") as full:
            full.write(bytes(2**20))

    flags = ("--data_path", sources["folder"], "--output_dir", tmp_path / "out", "--img_size", SIZE)
    with monkeypatch.context() as patch:
        patch.setattr("jit_accel.prepare.output._write_header", write_header)
        assert "the disk is full. What is finished is kept: make room" in refused(*flags)
    assert "GiB, and the disk has" in refused(*flags[:3], tmp_path / "large", "--img_size", 10**6)
    assert main(list(map(str, flags))) == 0


def test_other_settings_or_other_images_are_not_mixed_into_a_store(refused, sources, tmp_path):
    flags = ["--data_path", sources["folder"], "--img_size", SIZE, "--shard_images", "9", "--num_workers", "2"]
    out = tmp_path / "out"
    interrupted([*map(str, flags), "--output_dir", str(out)], "encode", out, "shard-*.json", signal.SIGKILL, True)
    message = refused(*flags, "--output_dir", out, "--seed", "1", "--format", "jpeg")
    assert "was begun otherwise: --format was uint8 and is jpeg now" in message
    assert "--seed was 0 and is 1 now" in message
    message = refused("--data_path", sources["parquet"], *flags[2:], "--output_dir", out)
    assert "the images of --data_path changed" in message
    prepare(sources["folder"], out)
    assert "holds images that were prepared otherwise: --resize was exact and is fast now" in refused(
        *flags, "--output_dir", out, "--resize", "fast"
    )


def test_no_image_at_all(refused, tmp_path):
    (tmp_path / "data").mkdir()
    for n in range(3):
        (tmp_path / "data" / f"{n}.png").write_bytes(b"no")
    message = refused("--data_path", tmp_path / "data", "--output_dir", tmp_path / "out")
    assert "none of its images can be decoded (" in message
    assert not (tmp_path / "out" / "index.json").exists()


def test_damaged_stores_are_refused(refused, tmp_path, capsys, sources):
    store = tmp_path / "store"
    prepare(sources["folder"], store)
    assert main(["--verify", str(store)]) == 0
    assert "58 images, all as they were written" in capsys.readouterr().out
    array = next(iter(sorted(store.glob("*.npy"))))
    data = bytearray(array.read_bytes())
    data[-1] ^= 1
    array.write_bytes(data)
    assert "1 of 14 files are not what was written: shard-00000.npy" in refused("--verify", store)
    open_images(store)  # costs no reading of everything
    array.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"shard-00000.npy has .* bytes where .* were written"):
        open_images(store)
    array.unlink()
    with pytest.raises(UserError, match=r"shard-00000.npy is missing"):
        open_images(store)
    (store / "index.json").write_text('{"format": "jit_accel.prepared", "version": 99, "shards": []}')
    with pytest.raises(UserError, match="has the version 99"):
        open_images(store)
    (store / "index.json").write_text('{"format": "jit_accel.prepared"')
    with pytest.raises(UserError, match="is damaged"):
        open_images(store)
    assert "there is no index.json" in refused("--verify", tmp_path)


def test_flags_that_a_store_has_no_use_for_are_refused(sources, tmp_path):
    prepare(sources["folder"], tmp_path / "out")
    with pytest.raises(UserError, match=r"label_column x: .* was prepared"):
        open_images(tmp_path / "out", label_column="x")
    with pytest.raises(UserError, match=r"streaming true: .* memory-mapped"):
        open_images(tmp_path / "out", streaming=True)


def test_an_index_of_something_else_does_not_make_a_folder_a_store(sources, tmp_path):
    (tmp_path / "index.json").write_text('{"photos": 1}')
    (tmp_path / "a.png").write_bytes(picture(1))
    assert isinstance(open_images(tmp_path).images, TableImages)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux")
@pytest.mark.parametrize("place", ["/proc/shards", "dangling"])
def test_a_place_where_no_folder_can_be_made_is_refused(place, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink("nowhere/there", "dangling")
    said = refused("--data_path", "builtin:fashion_mnist", "--output_dir", place)
    assert f"--output_dir {place}: cannot be written" in said
