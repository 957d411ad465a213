"""The conditions of images: pictures of the same names in another folder, and a look at the first ones of any kind."""

import logging
import os

import pyarrow as pa
import pyarrow.compute as pc

from jit_accel.base.errors import UserError, renamed_settings
from jit_accel.data.formats.pixel_format import some_rows
from jit_accel.data.formats.scan import scan_folder
from jit_accel.data.formats.source import Source
from jit_accel.data.reading.decode import BadCondition, BadImage, OtherAspect, decode_row
from jit_accel.data.reading.shards import missing_path

log = logging.getLogger(__name__)
_MOST_PAIRS = 64  # that are looked at before the first step
_SIDE = 8  # to which they are decoded there


def partners_by_name(images: pa.ChunkedArray, root: str, folder: str) -> pa.ChunkedArray:
    """Return the picture in `folder` that has the same relative name as each image of `root`, null where there is none.

    Its ending may be another; where several differ in that alone, the image's own or else the first one counts.
    UserError if there is no such folder, if it lies inside `root`, and if no image has a partner.
    """
    if not os.path.isdir(folder):
        with renamed_settings(data_path="condition_path"):
            raise missing_path(folder)
    for whole in (os.path.abspath, os.path.realpath):  # the walk over `root` follows links
        around, inside = (os.path.join(whole(path), "") for path in (root, folder))
        if not inside.startswith(around):
            continue
        rule = f"lies inside --data_path {root}, and would be trained on: put the conditions beside the images."
        raise UserError(rule, about="condition_path", value=folder)
    pictures = scan_folder(folder).images
    places = pc.coalesce(
        pc.index_in(images, value_set=pictures), pc.index_in(_stems(images), value_set=_stems(pictures))
    )
    if (missing := places.null_count) == len(images):
        there = f"such as {pictures[0]}" if len(pictures) else "without any picture"
        rule = f"none of the {missing} images of {root} has a picture of its name there ({there}): the condition of "
        rule += f"{images[0]} has the same name below this folder, with any ending of images."
        raise UserError(rule, about="condition_path", value=folder)
    if missing:
        example = images.filter(places.is_null())[0]
        rule = "--condition_path %s: %d of %d images have no picture of their name there and count as bad ones, as %s"
        log.warning(rule, folder, missing, len(images), example)
    return pictures.take(places)


def _stems(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return paths without their endings, in one form of Unicode."""
    return pc.utf8_normalize(pc.replace_substring_regex(paths, r"\.[^./]*$", ""), form="NFC")


def check_pairs(source: Source, about: str, value: str | None) -> None:
    """Raise `UserError` where the first pair that can be read has two aspects, or no condition of many can be read."""
    columns, reasons = getattr(source.images, "columns", None), []
    if columns is None or columns.condition is None:
        return
    for row in some_rows(source, _MOST_PAIRS):
        try:
            decode_row(row, columns, _SIDE)
            return
        except OtherAspect as error:
            rule = f"{error}. Both are cropped to one square, and must show the same: cut them out alike."
            raise UserError(rule, about=about, value=value) from error
        except BadCondition as error:
            reasons.append(str(error))
        except BadImage:  # which says nothing of its condition
            pass
    if reasons:
        rule = f"none of the conditions looked at ({len(reasons)}) can be used, the first: {reasons[0]}. Repair them, "
        raise UserError(rule + "or name others.", about=about, value=value)
