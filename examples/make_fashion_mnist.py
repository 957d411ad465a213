"""Make the data of `builtin:fashion_mnist`: `python examples/make_fashion_mnist.py FOLDER_OF_IDX_FILES [TARGET]`.

The folder holds {train,t10k}-images-idx3-ubyte.gz and {train,t10k}-labels-idx1-ubyte.gz, from Debian's package (apt-get
download dataset-fashion-mnist; dpkg -x) or from https://github.com/zalandoresearch/fashion-mnist. The same input gives
the same images in the same order; the bytes of the files depend on the versions of Pillow and PyArrow.
"""

import gzip
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image
from PIL import Image as PILImage

from jit_accel.base import rng

CLASS_NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
SPLITS = {"train": ("train", 1000), "test": ("t10k", 200)}  # how the original files begin, images a class
ROW_GROUP_SIZE = 2000
TARGET = Path(__file__).parents[1] / "jit_accel" / "data" / "builtin" / "fashion_mnist"
SEED = 0


def read_idx(file: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes: uint8, of the shape that its header states."""
    data = gzip.decompress(file.read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">u4", dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def choose(labels: np.ndarray, images_per_class: int) -> np.ndarray:
    """Return so many random indices of each class, shuffled together."""
    lottery = rng.hash64(SEED, "choose", np.arange(len(labels)))
    by_class = [np.flatnonzero(labels == label) for label in range(len(CLASS_NAMES))]
    chosen = np.concatenate([one[np.argsort(lottery[one])[:images_per_class]] for one in by_class])
    return chosen[np.argsort(rng.hash64(SEED, "shuffle", chosen))]


def as_png(pixels: np.ndarray) -> bytes:
    """Return a grey picture (28, 28) as the smallest PNG that Pillow can make."""
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def make(folder: Path, target: Path, name: str) -> None:
    """Write the subset of the split `name` to `target`."""
    beginning, images_per_class = SPLITS[name]
    images = read_idx(folder / f"{beginning}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{beginning}-labels-idx1-ubyte.gz")
    chosen = choose(labels, images_per_class)
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES)})
    rows = [{"bytes": as_png(images[i]), "path": f"{name}_{i:05d}.png"} for i in chosen]
    schema = features.arrow_schema
    table = pa.table({"image": pa.array(rows, schema.field("image").type), "label": labels[chosen].astype(np.int64)})
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.cast(schema), target, row_group_size=ROW_GROUP_SIZE, compression="zstd")
    print(f"{target}: {len(table)} images, {target.stat().st_size:,} bytes")


def main(folder: Path, target: Path = TARGET) -> None:
    for name in SPLITS:
        make(folder, target / f"{name}.parquet", name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
