"""Addresses of files on servers: what they spell, and what lies beside them."""

import itertools
import json
import logging
import posixpath
import re
from urllib.parse import urlsplit

import numpy as np

from jit_accel.base.errors import UserError
from jit_accel.data.data_error import data_error
from jit_accel.data.reading import outages
from jit_accel.data.reading.outages import patiently
from jit_accel.data.reading.shards import RemoteShard, Shard, at_once, describe, file_name, file_system

log = logging.getLogger(__name__)

MOST_FILES = 100_000
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_url(path: str) -> bool:
    """Return whether `--data_path` names files on a server."""
    return bool(_URL.match(path))


def ending_of(url: str) -> str:
    """Return `.tar` of `https://host/a-{000..009}.tar?key=value`, in lower case."""
    return posixpath.splitext(urlsplit(url).path)[1].lower()


def expand_braces(pattern: str) -> list[str]:
    """Return a-08-x, a-08-y, a-09-x, ... of `a-{08..10}-{x,y}`, in the order of a shell.

    UserError for braces that are no list or range, and for too many files.
    """
    pieces = _BRACES.split(pattern)  # text, braces, text, ..., text
    choices = [[piece] if n % 2 == 0 else _alternatives(piece, pattern) for n, piece in enumerate(pieces)]
    if np.prod([len(some) for some in choices], dtype=float) > MOST_FILES:
        raise data_error(pattern, f"these are more than {MOST_FILES:,} files: write larger shards.")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _alternatives(inside: str, pattern: str) -> list[str]:
    ends = _RANGE.fullmatch(inside)
    if ends:
        first, last = int(ends[1]), int(ends[2])
        if 0 <= last - first < MOST_FILES:
            return [f"{n:0{len(ends[1])}d}" for n in range(first, last + 1)]
    elif "," in inside:
        return inside.split(",")
    raise data_error(pattern, f"{{{inside}}} is no range and no list of names: write {{000..009}} or {{a,b}}.")


def find_remote_shards(path: str) -> list[RemoteShard]:
    """Return the files that an address means, as their servers describe them; UserError if one does not."""
    return at_once(describe, [url for pattern in expand_braces(path) for url in _matches(pattern)])


def _matches(pattern: str) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    if pattern.partition("://")[0].lower() in ("http", "https"):
        rule = "web servers do not list their files: name them by braces, as in shard-{000..009}.tar."
        raise data_error(pattern, rule)
    files, inside = file_system(pattern)
    found = patiently(lambda: sorted(files.glob(inside)), pattern, outages.OPENING_PATIENCE_S)
    if not found:
        raise data_error(pattern, "the pattern matches no file: correct the path.")
    return [files.unstrip_protocol(file) for file in found]


def counts_beside(shards: list[Shard]) -> np.ndarray | None:
    """Return the images of each remote tar file, int64 (files,), if a file beside them lists them.

    `sizes.json` maps file names to numbers; `index.json` of wids is {"shardlist": [{"url": ..., "nsamples": ...}]}.
    """
    folders = {shard.url.partition("?")[0].rpartition("/")[0] for shard in shards if shard.is_remote}
    if len(folders) != 1:
        return None
    folder, query = folders.pop(), shards[0].url.partition("?")[2]
    for name in ("sizes.json", "index.json"):
        counts = _read_counts(f"{folder}/{name}" + ("?" + query if query else ""))
        if counts is None:
            continue
        missing = next((shard for shard in shards if type(counts.get(shard.name)) is not int), None)
        if missing is None:
            return np.array([counts[shard.name] for shard in shards], np.int64)
        log.warning("%s beside %s does not say how many images it has, and is not used", name, missing)
    return None


def _read_counts(url: str) -> dict[str, int] | None:
    files, inside = file_system(url)
    try:
        entries = json.loads(patiently(lambda: files.cat_file(inside), url, outages.OPENING_PATIENCE_S))
    except (UserError, ValueError):  # there is none, or it is another's
        return None
    if isinstance(entries, dict) and isinstance(entries.get("shardlist"), list):
        shards = [shard for shard in entries["shardlist"] if isinstance(shard, dict)]
        return {file_name(str(shard.get("url"))): shard.get("nsamples") for shard in shards}
    return entries if isinstance(entries, dict) else None
