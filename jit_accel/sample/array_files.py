"""Images of any number of channels as arrays in files: a `.npy` each, in the units of the data."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jit_accel.base.errors import UserError
from jit_accel.base.files import atomic_file
from jit_accel.base.image_rows import as_pictures
from jit_accel.sample.image_files import ImageFiles
from jit_accel.sample.image_plan import ImageId, SamplePlan


class ArrayFiles(ImageFiles):
    """The images of a plan as files `000_name/000120.npy`, (H, W, channels).

    They are float32 in `value_range`, or uint8, 0 to 255, where the data has none.
    """

    def __init__(
        self,
        folder: Path,
        plan: SamplePlan,
        size: tuple[int, int],
        channels: int,
        value_range: Sequence[float] | None,
    ):
        super().__init__(folder, plan, size, "npy")
        self.shape, self.value_range = (*size, channels), value_range
        self.dtype = np.dtype(np.uint8 if value_range is None else np.float32)

    def is_whole(self, path: Path) -> bool:
        """Return whether a file is an array of this shape and type, to its end."""
        try:
            found = np.load(path, mmap_mode="r")
            return isinstance(found, np.ndarray) and (found.shape, found.dtype) == (self.shape, self.dtype)
        except (OSError, ValueError, EOFError):
            return False

    def read(self, image: ImageId) -> np.ndarray:
        """Return an image as a picture, uint8 (H, W, 3), its channels beside each other where they are no colours."""
        try:
            values = np.load(self.path(image))
        except (OSError, ValueError, EOFError) as error:
            rule = f"{self.path(image)}: cannot be read ({error}): remove it, and make it with --resume."
            raise UserError(rule) from None
        if self.value_range is not None:
            low, high = self.value_range
            values = np.rint((values - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
        return as_pictures(values)

    def _write(self, image: ImageId, pixels: np.ndarray) -> None:
        with atomic_file(self.path(image), durable=False) as temporary, open(temporary, "wb") as file:
            np.save(file, pixels.astype(self.dtype, copy=False))
