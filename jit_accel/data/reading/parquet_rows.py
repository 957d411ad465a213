"""Reading Parquet files by HF datasets, a row group at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, IterableDataset
from pyarrow.dataset import ParquetFragmentScanOptions

from jit_accel.base.errors import UserError
from jit_accel.data.formats.columns import Columns

_ROWS_AT_ONCE = 64
_MOST_OPEN_FILES = 32
_SCAN = ParquetFragmentScanOptions(pre_buffer=False)  # which saves a fifth of the time, and memory


@dataclass(frozen=True)
class ParquetReader:
    """The rows of row groups: these columns and no others, whatever is in the others."""

    columns: Columns
    features: Features
    _open: dict[str, IterableDataset] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, path: str, group: int, start: int = 0) -> Iterator[dict]:
        """Yield the rows of a row group from number `start` on; bare pixels as memory that belongs to Arrow.

        Raises:
            UserError: the file is damaged, or was replaced.
        """
        try:
            for table in self._tables(path, group):
                yield from self._rows(table.slice(start))
                start = max(0, start - len(table))
        except (OSError, ValueError, IndexError, pa.ArrowException) as error:
            raise UserError(
                f"row group {group} cannot be read ({error}): restore the file and go on with --resume auto.",
                about="data_path",
                value=path,
            ) from error

    def _tables(self, path: str, group: int) -> Iterable[pa.Table | pa.RecordBatch]:
        if self.columns.raw_size is not None:  # HF takes longer than all else that is done to bare pixels
            return read_row_group(path, group, self.columns.all).to_batches(_ROWS_AT_ONCE)
        # A file at a time, since `shard` costs time in proportion to the shards there are: 80 ms at 10,000
        if path not in self._open:
            if len(self._open) >= _MOST_OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            how = {"columns": list(self.features), "features": self.features, "fragment_scan_options": _SCAN}
            self._open[path] = IterableDataset.from_parquet(path, **how).reshard().with_format("arrow")
        dataset = self._open[path]
        return dataset.shard(num_shards=dataset.num_shards, index=group).iter(batch_size=_ROWS_AT_ONCE)

    def _rows(self, table: pa.Table | pa.RecordBatch) -> Iterator[dict]:
        if self.columns.raw_size is None:
            yield from table.to_pylist()
            return
        pixels, others = table[self.columns.image], table.drop_columns([self.columns.image]).to_pylist()
        for value, row in zip(pixels, others):
            buffer = value.as_buffer()
            yield {self.columns.image: None if buffer is None else memoryview(buffer), **row}


def read_row_group(path: str, group: int, columns: list[str]) -> pa.Table:
    """Return these columns of a row group of a file.

    Raises:
        OSError, IndexError, pa.ArrowException: the file is damaged, or was replaced.
    """
    with pq.ParquetFile(path) as parquet:
        return parquet.read_row_group(group, columns=columns, use_threads=False)
