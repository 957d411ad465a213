"""Small data sets for the tests of jit_accel.data, in which every image tells its own number."""

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Image
from PIL import Image as PILImage

from jit_accel.base.errors import UserError
from jit_accel.data import build_loader, open_images
from jit_accel.data.batches.order import StreamOrder

SIZE = 4


def png(number: int) -> bytes:
    """A one-coloured picture; `numbers_in` reads the number back from its pixels."""
    buffer = io.BytesIO()
    PILImage.new("RGB", (SIZE, SIZE), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def units_and_rows(order: StreamOrder, positions: np.ndarray) -> np.ndarray:
    """The unit and the row of the image at each of `positions`: int64 (k, 2)."""
    found, places = np.empty((len(positions), 2), np.int64), order.places(positions)
    windows, which = np.unique(np.stack(places[:3]), axis=1, return_inverse=True)
    for k, (epoch, lane, window) in enumerate(windows.T.tolist()):
        here = np.flatnonzero(which.reshape(-1) == k)
        numbers = order.shuffled(epoch, lane, window)[places.offset[here]]
        found[here] = np.stack(order.rows(epoch, numbers), axis=1)
    return found


def numbers_in(images) -> list[int]:
    """The numbers of a batch of pictures, (B, 3, H, W)."""
    corner = np.asarray(images)[:, :, 0, 0].astype(int)
    return (corner[:, 0] + 256 * corner[:, 1]).tolist()


def take(loader, count: int) -> list[int]:
    """The numbers of the next `count` batches."""
    return [number for _ in range(count) for number in numbers_in(next(loader).images)]


def image_folder(root: Path, count: int, classes: int = 2) -> Path:
    """Class folders c0, c1, ...; the n-th image in the order of the paths has number n."""
    for number in range(count):
        label = number * classes // count
        (root / f"c{label}").mkdir(parents=True, exist_ok=True)
        (root / f"c{label}" / f"{number:04d}.png").write_bytes(png(number))
    return root


def parquet(file: Path, numbers, labels=None, row_group_size: int = 5, bad=(), feature=None) -> Path:
    """A Parquet file of embedded PNGs; those in `bad` are damaged."""
    numbers = list(numbers)
    feature = feature or ClassLabel(names=["even", "odd"])
    schema = Features({"image": Image(), "label": feature}).arrow_schema
    rows = [{"bytes": b"damaged" if n in bad else png(n), "path": f"{n}.png"} for n in numbers]
    labels = [n % 2 for n in numbers] if labels is None else labels
    table = pa.table({"image": pa.array(rows, schema.field("image").type), "label": labels}).cast(schema)
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=row_group_size)
    return file


def tar(file: Path, members: dict[str, bytes]) -> Path:
    """A tar file of the given members, in their order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file


def labels_by_number(source, count: int | None = None) -> dict[int, int]:
    """{number of the image: its label} over one epoch, read through the loader as training would.

    count: of the images, where the source may not tell.
    """
    size = source.num_images if count is None else count
    loader = build_loader(source, img_size=SIZE, batch_size=size, seed=0, horizontal_flip=False)
    batch = next(loader)
    loader.close()
    assert not batch.bad_images
    return dict(zip(numbers_in(batch.images), batch.labels.tolist()))


def refusal(*args, **kwargs) -> str:
    """The message with which `open_images` refuses these arguments."""
    with pytest.raises(UserError) as caught:
        open_images(*args, **kwargs)
    return str(caught.value)


def as_hub(monkeypatch, kind, *files):
    """Let the Hub's data sets consist of these files."""

    def instead(real):
        return lambda path, **how: real(kind, data_files=list(map(str, files)), **how)

    for name in ("load_dataset", "load_dataset_builder"):
        monkeypatch.setattr(datasets, name, instead(getattr(datasets, name)))
