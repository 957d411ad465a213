"""The walk over a folder of image files, and what it found, which is kept until the folder changes."""

import itertools
import json
import os
import posixpath
import re
import time
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from jit_accel.base.findings import findings_file, read_findings, write_findings
from jit_accel.data.reading.arrays import ARRAY_EXTENSIONS
from jit_accel.data.reading.cache import RACY_NS
from jit_accel.data.reading.splits import choose_folders, has_split_word

IMAGE_EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
IMAGE_EXTENSIONS |= {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"}
METADATA_NAMES = frozenset(["metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet"])  # in any case
MOST_OTHERS = 100_000
# What jit_accel.sample leaves beside its class folders: a record, and pictures that are no samples.
SAMPLES_RECORD = "samples.json"
SAMPLES_PICTURES = frozenset(["grid.png", "trajectory.png", "animation.gif", "animation.webp"])

# Files by which folders inside the data are known as written by us: a run, a pipeline, samples, prepared images.
_OWN_FILES = ({"run.json", "config.yaml"}, {"model_index.json"}, {SAMPLES_RECORD}, {"index.json", "preview.png"})
_MARKS = set().union(*_OWN_FILES)
_SURROGATES = re.compile("[\ud800-\udfff]")  # as which Python reads bytes that are not UTF-8
_BROKEN_LINK = ("a link to nothing", "a link in a circle")
_PATHS_PER_CHUNK = 2**18  # far below the 2 GiB that the offsets of an Arrow string array reach


@dataclass
class FolderScan:
    """The content of a folder; all paths are relative to it, with /."""

    images: pa.ChunkedArray = field(default_factory=lambda: pa.chunked_array([], pa.string()))  # sorted
    metadata: list[str] = field(default_factory=list)  # files
    other_endings: Counter = field(default_factory=Counter)  # how many files of which other kinds
    others: list[str] = field(default_factory=list)  # the first of them
    unreadable: list[str] = field(default_factory=list)  # "path (reason)"
    doubtful: list[str] = field(default_factory=list)  # what may become readable without any folder changing
    directories: dict[str, int] = field(default_factory=dict)  # every folder and when it last changed
    own: list[str] = field(default_factory=list)  # folders that are left out, since we wrote them
    is_settled: bool = True  # no folder was changed so recently that another change might leave its mtime as it is


def scan_folder(root: str) -> FolderScan:
    """Return the images under `root`, which is walked only if any folder in it was changed since the last time."""
    scan = known_scan(root)
    if scan is None:
        scan = walk_folder(root)
        if scan.is_settled:
            facts = {name: value for name, value in vars(scan).items() if name != "images"}
            schema = pa.schema([("path", pa.string())], {"scan": json.dumps(facts)})
            data = pa.BufferOutputStream()
            with pa.ipc.new_file(data, schema) as writer:
                writer.write_table(pa.table([scan.images], schema=schema))
            write_findings(_findings_of(root), data.getvalue().to_pybytes())
    return scan


def known_scan(root: str) -> FolderScan | None:
    """Return the kept scan of the folder `root`, if that is still true."""
    data = read_findings(_findings_of(root))
    if data is None:
        return None
    table = pa.ipc.open_file(data).read_all()
    facts = json.loads(table.schema.metadata[b"scan"])
    if "own" not in facts:  # as those of earlier versions, which took what we wrote for images
        return None
    if not len(table) and ARRAY_EXTENSIONS & facts["other_endings"].keys():  # nor did these know arrays
        return None
    try:
        changes = [_changed_ns(os.stat(os.path.join(root, prefix))) for prefix in facts["directories"]]
    except OSError:  # one is gone
        return None
    doubtful = [path for name in facts["doubtful"] if os.path.exists(path := os.path.join(root, name))]
    is_better = any(not os.path.isdir(path) or os.access(path, os.R_OK | os.X_OK) for path in doubtful)
    if is_better or changes != list(facts["directories"].values()):
        return None
    return FolderScan(table.column(0), **facts | {"other_endings": Counter(facts["other_endings"])})


def _findings_of(root: str) -> str:
    return findings_file("folder with others", os.path.realpath(root))


def _changed_ns(info: os.stat_result) -> int:
    """Return when a folder changed last: its mtime, unless that was set back, as tar and cp -a do."""
    return max(info.st_mtime_ns, info.st_ctime_ns)


def walk_folder(root: str) -> FolderScan:
    """Walk `root`, following links but no loops; hidden files and folders are ignored.

    Arrays (.npy, .npz) are its images where there are no pictures, beside which they often are something else.
    """
    scan = _walked(root, IMAGE_EXTENSIONS)
    if not len(scan.images) and ARRAY_EXTENSIONS & scan.other_endings.keys():
        return _walked(root, ARRAY_EXTENSIONS)
    return scan


def _walked(root: str, endings: Set[str]) -> FolderScan:
    scan = FolderScan()
    paths = _walk(root, scan, endings)
    # By chunks, so that a million of them are never Python objects all at once.
    chunks = iter(lambda: list(itertools.islice(paths, _PATHS_PER_CHUNK)), [])
    scan.images = pa.chunked_array([pa.array(some, pa.string()) for some in chunks], pa.string())
    return scan


def has_images(root: str) -> bool:
    """Return whether `walk_folder` would find any; stops at the first one."""
    return next(_walk(root, FolderScan()), None) is not None


def _walk(root: str, scan: FolderScan, endings: Set[str] = IMAGE_EXTENSIONS) -> Iterator[str]:
    """Yield the images in the order of their whole paths."""
    stack: list = [("", ())]  # paths of images, and (path, ancestors) of folders
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
            continue
        prefix, ancestors = item
        folder = os.path.join(root, prefix)
        try:
            info = os.stat(folder)
            identity = (info.st_dev, info.st_ino)
            if identity in ancestors:  # a link back up; links to elsewhere are followed
                continue
            scan.is_settled &= 0 < info.st_mtime_ns < time.time_ns() - RACY_NS  # 0: a file system that keeps none
            files, folders = _list(folder, prefix, scan, endings)
        except OSError as error:
            scan.unreadable.append(f"{folder} ({error.strerror})")
            scan.doubtful.append(prefix)
            continue
        scan.directories[prefix] = _changed_ns(info)
        inside = (*ancestors, identity)
        # By its slash, a/b.jpg comes after a.jpg and before a0.jpg.
        names = sorted([*files, *(name + "/" for name in folders)], reverse=True)
        stack += [(prefix + name, inside) if name.endswith("/") else prefix + name for name in names]


def _list(folder: str, prefix: str, scan: FolderScan, endings: Set[str]) -> tuple[list[str], list[str]]:
    """Return the names of the images and of the folders in a folder."""
    files, folders, marks, found = [], [], set(), FolderScan()
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith((".", "__MACOSX")):
                continue
            marks |= _MARKS & {name}
            kind, ending = _kind(entry), os.path.splitext(name)[1].lower()
            if kind in _BROKEN_LINK:
                found.doubtful.append(prefix + name)
            if kind == "folder" and is_utf8(name):
                folders.append(name)
            elif kind == "file" and name.lower() in METADATA_NAMES:
                found.metadata.append(prefix + name)
            elif kind != "folder" and ending not in endings and (ending or kind == "file"):
                found.other_endings[ending or "no ending"] += 1
                if len(scan.others) + len(found.others) < MOST_OTHERS and is_utf8(name):
                    found.others.append(prefix + name)
            elif not is_utf8(name):
                found.unreadable.append(f"{ascii(entry.path)[1:-1]} (its name is not UTF-8)")
            elif kind != "file":
                found.unreadable.append(f"{entry.path} ({kind})")
            else:
                files.append(name)
    if prefix and any(marks.issuperset(files_of_one) for files_of_one in _OWN_FILES):
        scan.own.append(prefix)
        return [], []
    for kept, new in ((scan.metadata, found.metadata), (scan.others, found.others), (scan.doubtful, found.doubtful)):
        kept += new
    scan.unreadable += found.unreadable
    scan.other_endings += found.other_endings
    if SAMPLES_RECORD in marks:
        files = [name for name in files if name not in SAMPLES_PICTURES]
    return files, folders


class OfSplits(NamedTuple):
    """The part of a folder that is in the chosen splits."""

    scan: FolderScan  # with the images of these splits alone
    inner: pa.ChunkedArray  # their paths without the folders that name the splits
    left_out: list[str]  # the folders of other images, each with a / at its end
    split: str | None  # what is still to be chosen from by other means; see `choose_folders`


def scan_of_splits(scan: FolderScan, wanted: str | None, root: str) -> OfSplits:
    """Return what of `root` is in the splits that `--split` means."""
    if not any(map(has_split_word, scan.directories)):
        return OfSplits(scan, scan.images, [], wanted)
    folders = pc.replace_substring_regex(scan.images, "[^/]*$", "")
    counts = {item["values"]: item["counts"] for item in pc.value_counts(folders).to_pylist()}
    kept, split = choose_folders(counts, wanted, root)
    is_kept = pc.is_in(folders, value_set=pa.array(list(kept)))
    images = scan.images.filter(is_kept)
    inner = pa.array(list(kept.values())).take(pc.index_in(folders.filter(is_kept), value_set=pa.array(list(kept))))
    inner = pc.binary_join_element_wise(inner, pc.replace_substring_regex(images, "^.*/", ""), "")
    left_out = [folder for folder in counts if folder not in kept]
    above, above_lost = (
        {folder[: match.end()] for folder in some for match in re.finditer("^|/", folder)} for some in (kept, left_out)
    )
    places = {name: posixpath.join(posixpath.dirname(name), "") for name in scan.metadata}
    metadata = [name for name, place in places.items() if place in above or place not in above_lost]
    return OfSplits(replace(scan, images=images, metadata=metadata), inner, left_out, split)


def _kind(entry: os.DirEntry) -> str:
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
    except OSError:
        return _BROKEN_LINK[1]
    return "neither a file nor a folder" if os.path.exists(entry.path) else _BROKEN_LINK[0]


def is_utf8(name: str) -> bool:
    """Return whether Arrow can hold a name: it holds only UTF-8."""
    return not _SURROGATES.search(name)
