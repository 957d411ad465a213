"""Data on servers that fail: nothing is lost, nothing comes twice, and what cannot be mended is said."""

import errno
import gc
import json
import logging
import os
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch
from data_samples import SIZE, parquet, png, take, tar
from datasets import Value
from fsspec.implementations.local import LocalFileSystem
from helpers import rows, train_here
from http_server import FailingServer

from jit_accel.base.errors import UserError
from jit_accel.data import build_loader, open_images
from jit_accel.data.reading import cache as shard_cache
from jit_accel.data.reading import servers, shards

FILES, EACH = 3, 12  # in row groups of 5, 5 and 2
N = FILES * EACH
KINDS = ("parquet", "tar")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for file in range(FILES):
        numbers, members = range(file * EACH, (file + 1) * EACH), {}
        for n in numbers:
            members |= {f"{n:04d}.png": png(n), f"{n:04d}.cls": b"%d" % (n % 2)}
        parquet(folder / f"{file}.parquet", numbers)
        tar(folder / f"{file}.tar", members)
    (folder / "sizes.json").write_text(json.dumps({f"{file}.tar": EACH for file in range(FILES)}))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("JIT_ACCEL_CACHE", str(folder))
    return folder


@pytest.fixture
def server(folder):
    server = FailingServer(folder)
    yield server
    server.go_away()


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """Waits of milliseconds, and lines about every host."""
    monkeypatch.setattr(servers, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(servers, "LONGEST_WAIT_S", 0.2)
    monkeypatch.setattr(servers, "PATIENCE_S", 20.0)
    monkeypatch.setattr(servers, "_warned_s", {})


@pytest.fixture
def loaders():
    """Build loaders that are closed after the test."""
    opened = []

    def build(source, **changes):
        settings = {"img_size": SIZE, "batch_size": 1, "seed": 11, "shuffle_buffer": 4} | changes
        opened.append(build_loader(source, **settings))
        return opened[-1]

    yield build
    for loader in opened:
        loader.close()


def all_of(server, kind):
    return f"{server.url}/{{0..{FILES - 1}}}.{kind}"


MISCHIEF = {
    "slow": {"rate": 100_000},
    "drops": {"drop_every": 3, "drop_after": 700},
    "errors": {"error_every": 4, "error": 500},
    "overload": {"error_every": 4, "error": 503},
    "stalls": {"stall_every": 7},
    "no ranges": {"ranges": False},
    "no ranges, drops": {"ranges": False, "drop_every": 3, "drop_after": 1700},
    # without lengths a response that is cut short between two samples (2,048 bytes each) looks complete
    "no lengths, cut": {"lengths": False, "drop_every": 3, "drop_after": 2 * 2048},
    "no lengths, no ranges, cut": {"lengths": False, "ranges": False, "drop_every": 3, "drop_after": 2 * 2048},
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mischief", MISCHIEF)
def test_every_image_comes_once_an_epoch(server, loaders, monkeypatch, mischief, kind, num_workers):
    monkeypatch.setattr(servers, "READ_S", 0.1)
    for name, value in MISCHIEF[mischief].items():
        setattr(server, name, value)
    source = open_images(all_of(server, kind))
    loader = loaders(source, num_workers=num_workers)
    seen = take(loader, 2 * N)
    assert sorted(seen[:N]) == sorted(seen[N:]) == list(range(N))
    assert server.failures or not any("every" in name for name in MISCHIEF[mischief])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_server_may_go_away_for_a_while(server, loaders, kind, num_workers, caplog):
    loader = loaders(open_images(all_of(server, kind)), num_workers=num_workers)
    server.away_at, server.away_s = len(server.requests) + 1, 0.3
    with caplog.at_level(logging.WARNING):
        assert sorted(take(loader, N)) == list(range(N))
    assert server.failures == 1
    if num_workers == 0:
        lost, found = (record.message for record in caplog.records if record.name == servers.log.name)
        assert "trying again for up to 20 s" in lost
        assert "answers again" in found


def equal_batches(expected, got):
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.positions.tolist() == b.positions.tolist()
    return True


def batches(loader, count):
    return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_from_a_failing_server_are_those_of_the_local_files(server, folder, loaders, num_workers):
    local, far = open_images(folder / "?.parquet"), open_images(all_of(server, "parquet"))
    assert (far.num_images, far.class_names, far.num_classes) == (N, ("even", "odd"), 2)
    assert far.fingerprint == local.fingerprint
    server.drop_every, server.drop_after = 3, 700
    settings = {"num_workers": num_workers, "batch_size": 7}
    assert equal_batches(batches(loaders(local, **settings), 20), batches(loaders(far, **settings), 20))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [1, 5, 12])
def test_resume_is_exact_over_a_failing_server(server, loaders, kind, stop):
    source = open_images(all_of(server, kind))
    server.drop_every, server.drop_after = 3, 700
    whole = loaders(source, batch_size=3)
    batches(whole, stop)
    resumed = loaders(source, batch_size=3)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert equal_batches(batches(whole, 12), batches(resumed, 12))


def test_processes_may_come_and_go(server, loaders):
    source = open_images(all_of(server, "parquet"))
    server.drop_every, server.drop_after = 3, 700
    first = loaders(source)
    seen = take(first, 11)
    pair = [loaders(source, rank=rank, world_size=2) for rank in range(2)]
    for loader in pair:
        loader.load_state_dict([first.state_dict()])
        seen += take(loader, 9)
    last = loaders(source)
    last.load_state_dict([loader.state_dict() for loader in pair])
    seen += take(last, N - 29)
    assert sorted(seen) == list(range(N))


def test_an_index_beside_tars_spares_fetching_them_to_count_their_images(tmp_path, folder, loaders, caplog):
    for file in range(FILES):
        (tmp_path / f"{file}.tar").write_bytes((folder / f"{file}.tar").read_bytes())
    server = FailingServer(tmp_path)
    counted = open_images(all_of(server, "tar"))
    assert (counted.num_images, counted.num_classes) == (N, 2)
    assert "3 tar files are fetched once to count their images" in caplog.text
    wids = {"wids_version": 1, "shardlist": [{"url": f"{file}.tar", "nsamples": EACH} for file in range(FILES)]}
    (tmp_path / "index.json").write_text(json.dumps(wids))
    server.requests.clear()
    listed = open_images(all_of(server, "tar"))
    assert (listed.num_images, listed.num_classes) == (N, None)  # the labels were not read
    assert len(server.requests) == FILES + 2  # which describe them, and two for indices
    (tmp_path / "sizes.json").write_text(json.dumps({f"{file}.tar": EACH for file in range(FILES - 1)}))
    assert open_images(f"{server.url}/{{0..1}}.tar").num_images == 2 * EACH
    far, local = open_images(all_of(server, "tar")), open_images(folder / "?.tar")  # sizes.json lacks one: the other
    assert far.fingerprint == local.fingerprint == counted.fingerprint
    assert equal_batches(batches(loaders(local, batch_size=7), 10), batches(loaders(far, batch_size=7), 10))


# --- the cache


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_fetched_is_read_again_without_the_server(server, loaders, kind):
    take(loaders(open_images(all_of(server, kind))), N)
    again = loaders(open_images(all_of(server, kind)))
    server.go_away()
    assert sorted(take(again, N)) == list(range(N))


def test_a_file_is_fetched_once_by_all_that_want_it(server):
    shard = shards.describe(f"{server.url}/0.tar")
    server.requests.clear()
    server.rate = 100_000
    paths = shards.at_once(lambda _: shard.local(), range(4))
    assert len(set(paths)) == 1
    assert server.requests == ["GET /0.tar"]


def test_of_a_row_group_no_more_is_fetched_than_its_bytes(server, folder):
    source = open_images(f"{server.url}/0.parquet")
    rows = list(source.images.rows(1))
    assert [row["label"] for row in rows] == [n % 2 for n in range(5, 10)]
    spans = source.images.spans
    whole, copy = (file.read_bytes() for file in (folder / "0.parquet", Path(source.images.shards[0].local(spans[1]))))
    assert len(copy) == len(whole)
    for unit, ((start, end), _) in enumerate(spans.tolist()):
        assert copy[start:end] == (whole[start:end] if unit == 1 else bytes(end - start))


def test_copies_that_were_not_used_for_longest_give_way(server, cache, monkeypatch):
    monkeypatch.setattr(shard_cache, "_IN_USE_S", 0.0)
    files = [shards.describe(f"{server.url}/{file}.tar") for file in range(FILES)]
    monkeypatch.setenv("JIT_ACCEL_SHARD_CACHE_GIB", str(2.5 * files[0].size / 2**30))
    paths = [Path(file.local()) for file in files[:2]]
    os.utime(paths[0])
    os.utime(paths[1], (1e9, 1e9))
    paths.append(Path(files[2].local()))
    assert [path.is_file() for path in paths] == [True, False, True]
    monkeypatch.setenv("JIT_ACCEL_SHARD_CACHE_GIB", "much")
    with pytest.raises(UserError, match="JIT_ACCEL_SHARD_CACHE_GIB=much: it is a number of GiB"):
        files[1].local()


def test_a_copy_that_goes_away_while_room_is_made_does_no_harm(server, cache):
    (cache / "shards").mkdir()
    (cache / "shards" / "ab-0.tar").symlink_to(cache / "gone")  # listed, and not there when it is looked at
    assert Path(shards.describe(f"{server.url}/0.tar").local()).is_file()


def test_a_full_disk_is_named(server, monkeypatch):
    def write(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.RemoteShard, "_write", write)
    with pytest.raises(UserError, match=r"No space left on device.*JIT_ACCEL_CACHE"):
        open_images(f"{server.url}/0.tar")


def test_an_index_that_counts_too_many_is_found_out(tmp_path, folder, loaders):
    (tmp_path / "0.tar").write_bytes((folder / "0.tar").read_bytes())
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": EACH + 1}))
    loader = loaders(open_images(f"{FailingServer(tmp_path).url}/0.tar"))
    with pytest.raises(UserError, match=f"ended after {EACH} images where there were {EACH + 1}"):
        take(loader, N)


# --- giving up


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_stays_away_ends_the_run_with_a_message(server, loaders, monkeypatch, kind, num_workers):
    loader = loaders(open_images(all_of(server, kind)), num_workers=num_workers)
    monkeypatch.setattr(servers, "PATIENCE_S", 0.3)
    server.go_away()
    with pytest.raises(UserError, match=rf"{server.url}/\d.{kind}: no progress for 0.3 s .*--resume auto"):
        take(loader, N)


@pytest.mark.parametrize(("error", "message"), [(404, "no such file"), (403, "denies access"), (410, "status 410")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_ends_the_run_at_once(server, loaders, kind, error, message):
    loader = loaders(open_images(all_of(server, kind)))
    server.error_every, server.error = 1, error
    with pytest.raises(UserError, match=rf"{server.url}/\d.{kind}: .*{message}"):
        take(loader, N)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_named_at_the_start(server, kind):
    with pytest.raises(UserError, match=rf"{server.url}/3.{kind}: there is no such file"):
        open_images(f"{server.url}/{{0..3}}.{kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_is_not_there_is_named_at_the_start(server, monkeypatch, kind, caplog):
    monkeypatch.setattr(servers, "OPENING_PATIENCE_S", 0.3)
    server.go_away()
    with pytest.raises(UserError, match=rf"{server.url}/0.{kind}: no progress for 0.3 s .*check the address"):
        open_images(f"{server.url}/0.{kind}")
    assert "trying again for up to 0.3 s" in caplog.text


def test_secrets_are_not_shown(server):
    url = f"{server.url}/9.tar?X-Signature=secret".replace("//", "//someone:password@")
    with pytest.raises(UserError) as error:
        open_images(url)
    assert "secret" not in str(error.value)
    assert "password" not in str(error.value)


def test_an_archive_that_is_cut_short_on_the_server_is_named(tmp_path, folder, loaders):
    whole = (folder / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: len(whole) // 2 // 512 * 512 - 100])
    server = FailingServer(tmp_path)
    with pytest.raises(UserError, match=rf"{server.url}/0.tar: not a readable tar file"):
        take(loaders(open_images(f"{server.url}/0.tar")), N)


def test_data_that_changes_under_a_run_is_refused(tmp_path, loaders):
    file = parquet(tmp_path / "a.parquet", range(30))
    loader = loaders(open_images(f"{FailingServer(tmp_path).url}/a.parquet"))
    parquet(file, range(31))
    with pytest.raises(UserError, match=r"a.parquet: it has \d+ bytes now and had \d+"):
        take(loader, N)


# --- labels


def test_numbers_as_labels_are_known_from_the_footers(tmp_path, loaders):
    for file in range(2):
        parquet(tmp_path / f"{file}.parquet", range(10), [file + 3] * 10, feature=Value("int64"))
    source = open_images(f"{FailingServer(tmp_path).url}/{{0,1}}.parquet")
    assert source.num_classes == 5
    assert sorted(np.concatenate([b.labels for b in batches(loaders(source), 20)])) == [3] * 10 + [4] * 10


def test_text_labels_are_listed_by_reading_their_column(tmp_path, loaders):
    for file, names in enumerate((["cat"] * 5 + ["dog"] * 5, ["ant"] * 10)):
        parquet(tmp_path / f"{file}.parquet", range(10), names, feature=Value("string"))
    source = open_images(f"{FailingServer(tmp_path).url}/{{0,1}}.parquet")
    assert source.class_names == ("ant", "cat", "dog")
    assert sorted(np.concatenate([b.labels for b in batches(loaders(source), 20)])) == [0] * 10 + [1] * 5 + [2] * 5


def test_negative_labels_are_found_in_the_footers(tmp_path):
    parquet(tmp_path / "0.parquet", range(10), [-1] * 10, feature=Value("int64"))
    with pytest.raises(UserError, match="has the label -1"):
        open_images(f"{FailingServer(tmp_path).url}/0.parquet")


# --- what a data path may be


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("h://a-{08..11}.tar", ["h://a-08.tar", "h://a-09.tar", "h://a-10.tar", "h://a-11.tar"]),
        ("h://{x,y}/{0..1}", ["h://x/0", "h://x/1", "h://y/0", "h://y/1"]),
        ("h://a.tar?b=c,d", ["h://a.tar?b=c,d"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, expected):
    assert servers.expand_braces(pattern) == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("http://h/{3..1}.tar", r"\{3..1\} is no range"),
        ("http://h/{a}.tar", r"\{a\} is no range"),
        ("http://h/{0..999}{0..999}.tar", "more than 100,000 files"),
        ("http://h/*.tar", "name them by braces"),
        ("http://h/a.zip", "unknown; choose from .parquet, .tar"),
        ("s3://bucket/a.tar", "s3fs"),
        ("nonsense://bucket/a.tar", "nonsense:// is unknown"),
    ],
)
def test_an_address_that_cannot_be_read_is_refused(path, message):
    with pytest.raises(UserError, match=message):
        open_images(path)


def test_remote_tables_can_be_downloaded_for_random_access(server, loaders, hf_cache, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    source = open_images(all_of(server, "parquet"), streaming=False)
    assert (source.streaming, source.num_images) == (False, N)
    assert sorted(take(loaders(source), N)) == list(range(N))
    source = open_images(all_of(server, "tar"), streaming=False)
    assert (source.streaming, source.num_images) == (False, N)
    assert sorted(take(loaders(source, num_classes=2), N)) == list(range(N))


class _Flaky(LocalFileSystem):
    """A store of another protocol, whose reads fail now and then."""

    protocol = "flaky"
    reads = failures = 0

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("flaky://").lstrip("/")

    def _open(self, path, *args, **kwargs):
        file = super()._open(path, *args, **kwargs)
        read = file.read

        def flaky_read(*size):
            _Flaky.reads += 1
            if _Flaky.reads % 7 == 0:
                _Flaky.failures += 1
                raise ConnectionError("lost")
            return read(*size)

        file.read = flaky_read
        return file


@pytest.mark.parametrize("kind", KINDS)
def test_other_stores_are_read_on_through_failures_too(folder, loaders, kind):
    fsspec.register_implementation("flaky", _Flaky, clobber=True)
    source = open_images(f"flaky://{folder}/*.{kind}")
    assert source.num_images == N
    before = _Flaky.failures
    assert sorted(take(loaders(source), N)) == list(range(N))
    assert _Flaky.failures > before


def test_hub_tables_tell_the_sizes_of_their_row_groups(server, loaders, monkeypatch):
    urls, asked = servers.expand_braces(all_of(server, "parquet")), []

    def instead(real):
        def call(path, **how):
            asked.append((path, how.pop("name", None), how.pop("revision", None)))
            return real("parquet", data_files=urls, **how)

        return call

    for name in ("load_dataset", "load_dataset_builder"):
        monkeypatch.setattr(datasets, name, instead(getattr(datasets, name)))
    source = open_images("someone/pictures:small@v1.0")
    assert asked == [("someone/pictures", "small", "v1.0")]
    assert (source.format, source.num_images, source.images.num_units) == ("hub", N, 3 * FILES)
    assert sorted(take(loaders(source), N)) == list(range(N))


# --- processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_processes_leave_the_connections_of_their_parent_alone(server, monkeypatch):
    """They share an epoll object: to close an inherited connection would deafen the parent."""
    monkeypatch.setattr(servers, "READ_S", 5.0)
    monkeypatch.setattr(servers, "PATIENCE_S", 0.1)

    def new():
        return servers.file_system(server.url)[0]

    files = new()
    size = len(files.cat_file(f"{server.url}/0.tar"))
    pid = os.fork()
    if not pid:
        other = new()  # with it fsspec forgets those of the parent
        del files
        gc.collect()
        os._exit(len(other.cat_file(f"{server.url}/1.tar")) == 0)
    assert os.waitpid(pid, 0)[1] == 0
    assert shards.describe(f"{server.url}/1.tar").size == size
    assert not servers._warned_s  # nothing failed, not even a timeout


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_as_if_nothing_had_happened(server, tmp_path, monkeypatch, kind):
    flags = ["--data_path", all_of(server, kind), "--img_size", "28", "--num_classes", "2", "--shuffle_buffer", "2"]
    flags += ["--num_workers", "1", "--max_steps", "12"]
    assert train_here(*flags, "--output_dir", str(tmp_path / "calm")) == 0
    calm, server.away_s = len(server.requests), 0.3
    server.requests.clear()
    monkeypatch.setenv("JIT_ACCEL_CACHE", str(tmp_path / "cache"))
    server.away_at = calm * 2 // 3
    assert train_here(*flags, "--output_dir", str(tmp_path / "stormy")) == 0
    assert server.failures == 1
    one, other = ([row["train/loss"] for row in rows(tmp_path / name)] for name in ("calm", "stormy"))
    assert len(one) == 12
    assert one == other


def test_a_file_whose_size_a_server_does_not_tell_is_fetched_whole(monkeypatch):
    class Files:
        def info(self, inside):
            return {"name": inside}

    monkeypatch.setattr(shards, "file_system", lambda url: (Files(), "bucket/a.parquet"))
    shard = shards.describe("s3://bucket/a.parquet")
    assert (shard.size, shard.has_ranges) == (None, False)


def test_a_copy_that_is_removed_in_the_very_moment_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("JIT_ACCEL_CACHE", str(tmp_path))
    path, real = shard_cache.cached_shard("key", "a.tar", 1, lambda file: file.write(b"1")), os.utime

    def evicted(place):
        path.unlink(missing_ok=True)  # as another process does that makes room
        real(place)

    monkeypatch.setattr(shard_cache.os, "utime", evicted)
    assert shard_cache.cached_shard("key", "a.tar", 1, lambda file: file.write(b"2")).read_bytes() == b"2"
