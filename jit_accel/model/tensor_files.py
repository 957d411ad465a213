"""Tensors in safetensors files: written in one pass with checksums, whole or in pieces, and read slice by slice."""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from jit_accel.base.files import check_guard

CHUNK_BYTES = 1 << 24  # one checksum for each
_PIECES = "pieces"  # in a file's metadata: {name: [offset, shape of the whole]} of tensors that are not whole
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


LARGEST = 1e18  # the square of what is much larger is infinite in float32


class Unsound(ValueError):
    """A tensor holds what no training can go on with."""


@dataclass(frozen=True)
class Piece:
    """The block of a tensor of this `shape` that begins at `offset`: all of it, or what one process holds."""

    values: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> "Piece":
        return cls(tensor, (0,) * tensor.ndim, tuple(tensor.shape))

    @property
    def is_whole(self) -> bool:
        return tuple(self.values.shape) == self.shape


@dataclass
class Written:
    """The facts of a file that was written: its size in bytes, and the CRC-32 of each `CHUNK_BYTES` of it."""

    size: int = 0
    sums: list[int] = field(default_factory=list)


class SummedFile:
    """A new file that is written from its beginning on, and summed up as it is handed over."""

    def __init__(self, file: FileIO):
        self.file, self.written = file, Written()

    def write(self, data: bytes | memoryview) -> None:
        rest, written = memoryview(data).cast("B"), self.written
        while rest:
            begins = written.size % CHUNK_BYTES
            part = rest[: min(CHUNK_BYTES - begins, self.file.write(rest[: CHUNK_BYTES - begins]))]
            rest = rest[len(part) :]
            if begins:
                written.sums[-1] = zlib.crc32(part, written.sums[-1])
            else:
                written.sums.append(zlib.crc32(part))
            written.size += len(part)


@contextmanager
def summed_file(path: Path) -> Iterator[SummedFile]:
    """Give a file to write to, which is on the disk at the block's end. Raises `OSError`."""
    with open(path, "wb", buffering=0) as file:  # what is not written yet when something fails shall not be
        yield SummedFile(file)
        os.fsync(file.fileno())


def chunks_of(path: Path, size: int) -> Iterator[tuple[Path, int]]:
    """Yield the chunks of a file of this size: its path, and where each begins."""
    for begin in range(0, size, CHUNK_BYTES):
        yield path, begin


def sum_of(chunk: tuple[Path, int]) -> int:
    """Return the CRC-32 of a chunk as it lies on the disk. Raises `OSError`."""
    path, begin = chunk
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        return zlib.crc32(file.read(CHUNK_BYTES))


def write_tensors(path: Path, pieces: Mapping[str, Piece]) -> Written:
    """Write a safetensors file of CPU tensors, to the disk; pieces of tensors say in its metadata where they belong.

    Raises `OSError`, and `Unsound` where a value is not finite, or beyond `LARGEST`.
    """
    # As safetensors itself writes: wide types first, so that each tensor is aligned.
    names = sorted(pieces, key=lambda name: (-pieces[name].values.element_size(), name))
    header, end = {}, 0
    if partial := {name: (p.offset, p.shape) for name, p in pieces.items() if not p.is_whole}:
        header["__metadata__"] = {_PIECES: json.dumps(partial)}
    for name in names:
        values = pieces[name].values
        begin, end = end, end + values.nbytes
        header[name] = {"dtype": _DTYPES[values.dtype], "shape": list(values.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    check_guard(path)
    with summed_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            check_sound(name, pieces[name].values)
            check_guard(path)  # a process that has slept may not write on
            file.write(_bytes_of(pieces[name].values))
    return file.written


def check_sound(name: str, values: Tensor) -> None:
    """Raise `Unsound` unless all values are finite, and at most `LARGEST` in magnitude."""
    if values.is_floating_point() and values.numel():
        low, high = (value.item() for value in values.aminmax())
        if not -LARGEST <= low <= high <= LARGEST:
            raise Unsound(f"{name} holds {high if abs(high) >= abs(low) or high != high else low:.3g}")


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


class StoredTensor:
    """A tensor in one file, or in pieces in several. `tensor[slices]` reads them; slices have a start and a stop."""

    def __init__(self, shape: Iterable[int], dtype: torch.dtype):
        self.shape, self.dtype = torch.Size(shape), dtype
        self.places: list[tuple[Path, str, tuple[int, ...], tuple[int, ...]]] = []  # file, name, offset, shape

    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor:
        """Return the values on the CPU. Raises `SafetensorError`, `OSError` or `ValueError`: a file is broken."""
        found = torch.empty([max(0, s.stop - s.start) for s in slices], dtype=self.dtype)
        missing = found.numel()
        for file, name, offset, shape in self.places:
            ranges = [(max(s.start, o), min(s.stop, o + n)) for s, o, n in zip(slices, offset, shape)]
            if not missing or any(begin >= end for begin, end in ranges):
                continue
            with safe_open(file, framework="pt") as opened:
                inner = tuple(slice(begin - o, end - o) for (begin, end), o in zip(ranges, offset))
                values = opened.get_slice(name)[inner] if inner else opened.get_tensor(name)
            missing -= values.numel()
            if values.shape == found.shape:
                return values
            found[tuple(slice(begin - s.start, end - s.start) for (begin, end), s in zip(ranges, slices))] = values
        if missing:
            raise ValueError(f"{missing:,} values of a tensor of {tuple(self.shape)} are in no file")
        return found

    def whole(self) -> Tensor:
        """Return all of it; errors as above."""
        return self[tuple(slice(0, n) for n in self.shape)]


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors in these files by name, of which the headers alone are read.

    Raises `SafetensorError`, `OSError` or `ValueError` where a file is broken.
    """
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    found: dict[str, StoredTensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            partial = json.loads((file.metadata() or {}).get(_PIECES, "{}"))
            names = file.keys()
            for name in names:
                values = file.get_slice(name)
                shape = tuple(values.get_shape())
                offset, whole = partial.get(name, ((0,) * len(shape), shape))
                # Where Accelerate had wrapped the network for torch.compile, names had a prefix.
                plain = name.replace("_orig_mod.", "")
                tensor = found.setdefault(plain, StoredTensor(whole, dtypes[values.get_dtype()]))
                tensor.places.append((path, name, tuple(offset), shape))
    return found
