"""Folders of image files: one class a subfolder, labels from metadata files, or unlabelled.

Our own walk, because HF's `imagefolder` takes folders named train or test for splits and streams in class order.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from jit_accel.base.errors import UserError
from jit_accel.base.shared_tables import shared_table
from jit_accel.data import data_error
from jit_accel.data.formats.columns import Columns, named_classes
from jit_accel.data.formats.label_lists import different_labels
from jit_accel.data.formats.metadata import listed_in_metadata, listed_paths
from jit_accel.data.formats.numbers import tally_of, vectors_of_tallies
from jit_accel.data.formats.partners import partners_by_name
from jit_accel.data.formats.scan import (
    IMAGE_EXTENSIONS,
    FolderScan,
    is_utf8,
    known_scan,
    scan_folder,
    scan_of_splits,
)
from jit_accel.data.formats.source import Request, Source, source_of
from jit_accel.data.reading.images import TableImages
from jit_accel.data.reading.shards import missing_path
from jit_accel.data.reading.splits import TRAIN, choose_splits

log = logging.getLogger(__name__)

_FACTS = b"jit_accel"  # in the metadata of a table of images

# Pictures that Pillow cannot read: a folder full of them should not look empty.
UNDECODABLE_EXTENSIONS = frozenset(
    [".heic", ".heif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"]
)
# Files that say what is in images, to people, or to other programs.
_LABELS_NAME = r"(^|/)(metadata|labels?|annotations?|captions?|classes)\.\w+$"
_LABEL_FILE = re.compile(rf"{_LABELS_NAME}|[.](csv|tsv|xlsx?|ods|jsonl?|xml)([.](gz|bz2|xz|zst|zip))?$", re.IGNORECASE)


def is_about_images(file: str) -> bool:
    """Return True for a file that by its name says what is in images, whatever its ending."""
    return re.search(_LABELS_NAME, file, re.IGNORECASE) is not None


def is_known_image_folder(folder: str) -> bool:
    """Return whether a folder was opened before, is unchanged, and holds images and no files of other formats."""
    scan = known_scan(folder)
    return scan is not None and len(scan.images) > 0 and not scan.other_endings.keys() & {".parquet", ".tar"}


def open_folder(request: Request) -> Source:
    """Open a folder of images.

    Labels come from metadata.csv or metadata.jsonl where there are any (see `listed_in_metadata`), else from the
    names of the subfolders. A flat folder, or one with a single subfolder, is unlabelled: one class, of its name.
    Conditions are pictures of the same names in another folder, or those that a column of the metadata names.
    UserError if it is missing, has no images, has wrong metadata, or no condition where these are asked for.
    """
    root = request.path
    if not os.path.isdir(root):
        raise missing_path(root)
    request.refuse("image_column", reason="is a folder of images, which has no columns of images")
    request.refuse("streaming", reason="is a folder of images, which is read by random access (better shuffled)")
    where = os.path.abspath(root)
    if not is_utf8(where):
        raise data_error(f"{root!a}", "the name of the folder is not UTF-8: rename it.")
    table = shared_table(f"folder {where} {request}", lambda: _table_of_images(request, where))
    facts = json.loads(table.schema.metadata[_FACTS])
    # HF would hash the whole table for a fingerprint
    dataset = Dataset(table, fingerprint=facts["identity"])
    vectors = vectors_of_tallies(tuple(facts["tallies"]), [facts["tallies"].values()], root)
    found = {name: own for name, own in _own_names(facts["tallies"]).items() if own in table.column_names}
    sizes: dict = {"vectors": vectors.names, "vector_sizes": vectors.sizes} if vectors else {}
    if "label" in found and pa.types.is_list(table.schema.field(found["label"]).type):
        sizes["most_labels"] = different_labels(table[found["label"]])[1]
    images, names = TableImages(dataset, Columns(**found, **sizes)), tuple(facts["names"])
    return source_of(root, "folder", images, names, facts["identity"], vectors=vectors)


def _table_of_images(request: Request, where: str) -> pa.Table:
    """Return the paths and labels of the images, and in the metadata the names of the classes and the fingerprint."""
    root = request.path
    scan = scan_folder(root)
    _report_unreadable(root, scan)
    if not len(scan.images):
        raise data_error(root, _emptiness(scan))
    chosen = scan_of_splits(scan, request.split, root)
    if (scan := chosen.scan).metadata:
        how = request.label_column, request.renumber_labels, request.condition_column, request.vector_column
        how = *how, request.label_separator
        images, ids, names, numbers = listed_in_metadata(root, chosen, *how)
    else:
        choose_splits({TRAIN: len(scan.images)}, chosen.split, root)
        needing = "label_column", "renumber_labels", "condition_column", "vector_column", "label_separator"
        request.refuse(*needing, reason="has no columns, without metadata.csv or metadata.jsonl")
        (images, ids, names), numbers = _classify(root, scan.images, chosen.inner), pa.table({})
    identity = hash_strings(images, ["folder", str(len(images))])
    if scan.metadata and ids is not None:  # which class folders show in the paths
        of_each = ids.cast(pa.string()) if pa.types.is_integer(ids.type) else pa.array(map(str, ids.to_pylist()))
        identity = hash_strings(pa.chunked_array([of_each]), ["metadata", identity])
    names = names or (os.path.basename(where) or "image",)
    # By columns: `Dataset.from_dict` would encode a million paths one by one
    paths = pc.binary_join_element_wise(where.rstrip("/"), images, "/")
    own = _own_names(numbers.column_names)
    features = Features({own["image"]: Image(decode=False)})
    table = {own["image"]: _as_files(paths)}
    if ids is not None:
        kind = ClassLabel(names=list(names))
        has_lists = pa.types.is_list(ids.type)
        features[own["label"]], table[own["label"]] = List(kind) if has_lists else kind, ids
    if (found := _partners(request, scan.metadata, images)) is not None:
        partners, paths = found
        identity = hash_strings(pc.fill_null(partners, ""), ["condition", identity])
        features[own["condition"]], table[own["condition"]] = Image(decode=False), _as_files(paths)
    for name, column in zip(numbers.column_names, numbers.columns):
        features[name], table[name] = List(Value("float64")), column
    schema = features.arrow_schema
    tallies = {name: tally_of(numbers[name]) for name in numbers.column_names}
    facts = json.dumps({"names": names, "identity": identity, "tallies": tallies})
    return pa.table(table).cast(schema.with_metadata(schema.metadata | {_FACTS: facts}))


def _as_files(paths: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return paths as undecoded images."""
    return pc.make_struct(pa.scalar(None, pa.binary()), paths, field_names=["bytes", "path"])


def _partners(
    request: Request, metadata: list[str], images: pa.ChunkedArray
) -> tuple[pa.ChunkedArray, pa.ChunkedArray] | None:
    """Return the conditions that are asked for, null where one is missing: as they are named, and their whole paths.

    UserError if there is none at all.
    """
    root, folder, column = request.path, request.condition_path, request.condition_column
    if folder is not None:
        partners = partners_by_name(images, root, folder)
        return partners, pc.binary_join_element_wise(os.path.abspath(folder).rstrip("/"), partners, "/")
    if column is None:
        return None
    listed = listed_paths(root, metadata, images, column)
    paths = [path and os.path.normpath(os.path.join(os.path.abspath(root), path)) for path in listed.to_pylist()]
    named = [path for path in paths if path]
    if not any(map(os.path.isfile, named)):
        first = f"{len(named)} files that it names is there (the first: {named[0]})" if named else "images has one"
        rule = f"none of the {first}: it must hold paths relative to the folder of the metadata file."
        raise UserError(rule, about="condition_column", value=column)
    return listed, pa.chunked_array([pa.array(paths, pa.string())])


def _own_names(taken: Iterable[str]) -> dict[str, str]:
    """Return what the columns of images, labels and conditions are called, other than those `taken` by numbers."""
    return {name: f"{name} of the folder" if name in taken else name for name in ("image", "label", "condition")}


def _classify(
    root: str, images: pa.ChunkedArray, inner: pa.ChunkedArray
) -> tuple[pa.ChunkedArray, pa.Array | None, tuple[str, ...]]:
    """Return the images, and classes by the first folders of their `inner` paths; () where there is a single one."""
    is_in_folder = pc.greater_equal(pc.find_substring(inner, "/"), 0)
    in_folders = inner.filter(is_in_folder)
    if not len(in_folders):
        return images, None, ()
    folders = pc.list_element(pc.split_pattern(in_folders, "/", max_splits=1), 0)
    classes, names = named_classes(pc.unique(folders).to_pylist(), root)
    strays = len(images) - len(in_folders)
    if len(names) == 1:
        return images, None, () if strays else names
    if strays:
        log.warning("--data_path %s: %d images beside the class folders have no class: skipped", root, strays)
    places = pc.index_in(folders, value_set=pa.array(list(classes)))
    return images.filter(is_in_folder), pa.array(list(classes.values())).take(places.combine_chunks()), names


def hash_strings(strings: pa.ChunkedArray, head: Iterable[str] = ()) -> str:
    """Return sixteen hex digits of `head` and the strings, joined by zero bytes, without a Python object for each."""
    digest = hashlib.sha256("".join(part + "\0" for part in head).encode())
    for chunk in strings.chunks:
        for start in range(0, len(chunk), 2**18):
            part = chunk.slice(start, 2**18)
            row = pa.ListArray.from_arrays(pa.array([0, len(part)], pa.int32()), part)
            digest.update(pc.binary_join(row, "\0")[0].as_buffer())
            digest.update(b"\0")
    return digest.hexdigest()[:16]


def _emptiness(scan: FolderScan) -> str:
    looked_for = " ".join(sorted(IMAGE_EXTENSIONS))
    if not scan.other_endings:
        return f"the folder is empty. Put images in it (one subfolder a class, or none): {looked_for}."
    found = ", ".join(f"{count} x {ending}" for ending, count in scan.other_endings.most_common(5))
    remedy = "give a folder of images, of Parquet files or of .tar files."
    if UNDECODABLE_EXTENSIONS & scan.other_endings.keys():
        remedy = "convert them to JPEG or PNG."
    return f"no images found. Looked for {looked_for} here and in all subfolders, and found {found}: {remedy}"


def _report_unreadable(root: str, scan: FolderScan) -> None:
    if scan.own:
        rule = (
            "--data_path %s: %d folders that jit_accel wrote (runs, pipelines, samples, prepared images) are no data "
        )
        log.warning(rule + "and are left out, the first: %s", root, len(scan.own), scan.own[0])
    if bad := scan.unreadable:
        rule = "--data_path %s: %d files or folders cannot be read and are skipped, the first: %s"
        log.warning(rule, root, len(bad), bad[0])
    counts = scan.other_endings.most_common()
    undecodable = ", ".join(f"{count} x {ending}" for ending, count in counts if ending in UNDECODABLE_EXTENSIONS)
    if undecodable and len(scan.images):
        rule = "--data_path %s: %s cannot be decoded and are left out: convert them to JPEG or PNG"
        log.warning(rule, root, undecodable)
    tables = [name for name in scan.others if _LABEL_FILE.search(name)]
    if tables and len(scan.images) and not scan.metadata:
        rule = "--data_path %s: %s is not read: labels come from metadata.csv (file_name,label) or names of folders"
        more = f", ... ({len(tables)} such files)" if len(tables) > 3 else ""
        log.warning(rule, root, ", ".join(tables[:3]) + more)
