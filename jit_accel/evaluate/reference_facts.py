"""The labels and numbers of a reference's images, which a model that was trained with numbers is given in turn."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jit_accel.base.errors import UserError, renamed_settings
from jit_accel.base.processes import gather_rows
from jit_accel.data.batches.batch import labels_in, listed
from jit_accel.data.formats.columns import COLOUR, PixelFormat
from jit_accel.data.formats.numbers import Vectors
from jit_accel.data.formats.sources import Source, open_images
from jit_accel.evaluate.image_sets import Share
from jit_accel.evaluate.pairs import label_function
from jit_accel.evaluate.statistics import ReferenceFacts
from jit_accel.model.pipeline import JiTPipeline


@dataclass
class FactsTally:
    """The facts of the images of a data set that this process reads."""

    source: Source
    pipeline: JiTPipeline
    numbers: list[Tensor] = field(default_factory=list)
    facts: list[np.ndarray] = field(default_factory=list)

    def add(self, share: Share) -> None:
        """Keep what is known of some images."""
        self.numbers.append(share.numbers)
        self.facts.append(share.facts)

    def finish(self, accelerator: Any) -> ReferenceFacts | None:
        """Return the facts of all processes' images; None where they are none that the model was trained with."""
        facts = np.concatenate([np.empty(0, self.source.facts_type), *self.facts])
        order = gather_rows(torch.cat([torch.empty(0, dtype=torch.int64), *self.numbers]), accelerator).argsort()
        labels = gather_rows(labels_in(facts), accelerator)[order]
        vectors = None
        if self.source.vectors is not None:
            vectors = gather_rows(torch.from_numpy(np.ascontiguousarray(facts["vectors"])), accelerator)[order].tolist()
        known = self._labels(labels) if vectors is not None or self.source.most_labels is not None else None
        return ReferenceFacts(known, vectors) if len(order) and (known or vectors) else None

    def _labels(self, labels: Tensor) -> list | None:
        """Return labels as the network knows them; None for those of other classes, or of none."""
        if not self.source.is_labelled:
            return None
        try:
            known = label_function(self.source, self.pipeline)
        except UserError:
            return None
        return [list(map(known, one)) if isinstance(one, list) else known(one) for one in listed(labels)]


def open_with_facts(
    path: str | Source,
    pipeline: JiTPipeline,
    *,
    split: str | None,
    pixels: PixelFormat = COLOUR,
    **reading: Any,
) -> Source | str:
    """Open a reference with the columns that a model was trained with, where it has them; else return the path.

    reading: further settings of `open_images`. Raises `UserError` for what is no data.
    """
    columns = Vectors.of_record(pipeline.config.get("vectors"))
    if not isinstance(path, str) or (columns is None and reading.get("label_column") is None):
        return path
    how = {"split": split, "in_channels": pixels.channels, "value_range": pixels.value_range, **reading}
    with renamed_settings(data_path="reference"):
        try:
            return open_images(path, vector_column=columns.names if columns else (), **how)
        except UserError as error:
            if error.about != "vector_column":
                raise
            return open_images(path, **how)


def fits(source: Source | str, pipeline: JiTPipeline) -> bool:
    """Return whether a reference's images have numbers, or several labels, that a model was trained with."""
    if not isinstance(source, Source):
        return False
    columns, several = pipeline.config.get("vectors"), pipeline.transformer.config.get("has_several_labels", False)
    has_numbers = columns is not None and source.vectors is not None
    is_as_trained = has_numbers and source.vectors.names == tuple(columns["names"])
    is_as_trained = is_as_trained and source.vectors.sizes == tuple(columns["sizes"])
    return is_as_trained or (several and source.most_labels is not None)
