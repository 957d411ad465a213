"""The numbers that a network is given beside the noise: the same for all images, or a row of a file for each."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jit_accel.base.errors import UserError, shown
from jit_accel.data.formats.numbers import numbers_of
from jit_accel.model.vector_arguments import vectors_asked

_ENDINGS = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class GivenNumbers:
    """Numbers in the units of the data; image number n of a class, or of none, has row n, and they come round again."""

    rows: list[list[float]]
    is_file: bool
    record: str  # as it stands in samples.json

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> list[list[float]]:
        """Return the numbers of images."""
        return [self.rows[index % len(self)] for index in indices]


def open_numbers(words: Sequence[str], columns: Mapping | None, model: str) -> GivenNumbers | None:
    """Return the numbers that `--vectors` names (NAME=VALUE ..., or a file of rows); None for none.

    Raises `UserError`: the model takes none, or others; a file that cannot be read, or has no row.
    """
    if not words:
        return None
    value = _as_typed(words)
    if not columns:
        raise UserError(f"{model} was trained without numbers: leave it out.", about="vectors", value=value)
    is_file = len(words) == 1 and Path(words[0]).suffix.lower() in _ENDINGS
    rows = _rows_of(Path(words[0]).expanduser()) if is_file else [_pairs_of(words, columns["names"])]
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found += vectors_asked([_checked(row, columns["names"])], columns, 1)
        except ValueError as error:
            where = f"row {number}: " if is_file else ""
            raise UserError(f"{where}{error}: give {_example(columns)}.", about="vectors", value=value) from None
    if not found:
        raise UserError("has no rows: write one for each image.", about="vectors", value=value)
    digest = hashlib.sha256(repr(found).encode()).hexdigest()[:16]
    said = [f"{name}={','.join(numbers)}" for name, numbers in rows[0].items()] if not is_file else []
    return GivenNumbers(found, is_file, " ".join(said) or f"{Path(value).name} ({len(found)} rows, {digest})")


def _checked(row: Mapping, names: Sequence[str]) -> dict[str, list[float]]:
    """Return the numbers of these columns. Raises `ValueError` where one is missing, or holds no numbers."""
    found = {}
    for name in names:
        if name not in row:
            raise ValueError(f"{name} is missing")
        value = row[name]
        if (numbers := numbers_of(_as_list(value))) is None:
            raise ValueError(f"{name} is {shown(value)[:40]!r} and not finite numbers")
        found[name] = numbers
    return found


def _as_list(value: Any) -> Any:
    """Return the parts of a cell such as 0.2,-0.1; anything else as it is."""
    is_several = isinstance(value, str) and "," in value and "[" not in value
    return value.split(",") if is_several else value


def _as_typed(words: Sequence[str]) -> str:
    """Return words as they were given, before the command line divided them at commas."""
    return re.sub(r" (?=[^ =]+( |$))", ",", " ".join(words)) if "=" in words[0] else " ".join(words)


def _pairs_of(words: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Return what age=34 and pose=0.2,-0.1 say, of which the command line makes age=34, pose=0.2 and -0.1."""
    row: dict[str, list[str]] = {}
    for word in words:
        name, mark, number = word.rpartition("=")
        problem = None
        if mark and (name in row or name not in names):
            problem = f"{name} is given twice" if name in row else f"{name} is no column of the model's"
        elif mark:
            row[name] = [number]
        elif row:
            row[list(row)[-1]].append(number)
        else:
            problem = f"{word} is no NAME=VALUE, and no file (.csv, .tsv, .jsonl)"
        if problem:
            rule = f"{problem}: give {' '.join(f'{one}=...' for one in names)}."
            raise UserError(rule, about="vectors", value=_as_typed(words))
    return row


def _rows_of(path: Path) -> list[dict]:
    """Return the rows of a .csv, .tsv or .jsonl file. Raises `UserError`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() != ".jsonl":
            mark = "\t" if path.suffix.lower() == ".tsv" else ","
            return list(csv.DictReader(io.StringIO(text), delimiter=mark))
        return [_object_in(line, number) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot be read ({reason}): correct it.", about="vectors", value=path) from None


def _object_in(line: str, number: int) -> dict:
    """Return the object in a line. Raises `ValueError`, which says what line is wrong."""
    with suppress(ValueError):
        if isinstance(row := json.loads(line), dict):
            return row
    raise ValueError(f'line {number} is not like {{"age": 34}}')


def _example(columns: Mapping) -> str:
    return " ".join(f"{name}={','.join(['0'] * size)}" for name, size in zip(columns["names"], columns["sizes"]))
