"""The splits of a data set, by the words for train, validation and test that HF datasets knows, and the chosen ones.

And by trn and tst.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from datasets.data_files import SPLIT_KEYWORDS

from jit_accel.base.errors import UserError, lookup

log = logging.getLogger(__name__)

TRAIN, VALIDATION, TEST, ALL, OTHERS = "train", "validation", "test", "all", "others"
_OF_IMAGES = ("set", "data", "images")  # which may stand behind such a word: test_set, testset
_SPLIT_OF = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words} | {
    "trn": TRAIN,
    "tst": TEST,
}
_SPLIT_OF |= {word + end: split for word, split in _SPLIT_OF.items() for end in _OF_IMAGES}
_ONLY_OF_IMAGES = re.compile(rf"([-_. ]*({'|'.join(_OF_IMAGES)}))?/", re.IGNORECASE)
_HUMP = re.compile("(?<=[a-z])(?=[A-Z])")  # between the words of testImages
_LETTER = re.compile(r"[^\W\d_]")


def choose_splits(sizes: Mapping[str, int], wanted: str | None, where: str, of: str = "images") -> list[str]:
    """Return the names of the splits that `--split` means (None: train), out of those there, with their `sizes`.

    What is left out without having been asked for is said. UserError if there is no such split, or none is asked for
    where there are several, and none to train on.
    """
    by_split = {split_of(name): name for name in sizes} | {name: name for name in sizes}
    if wanted == ALL or (wanted is None and len(sizes) == 1):
        return list(sizes)
    if wanted is None and TRAIN not in by_split:
        rule = f"not given, and {where} has no split to train on, only {', '.join(sizes)}: choose one of them, several "
        raise UserError(rule + f"({'+'.join(list(sizes)[:2])}), or all.", about="split")
    names = [name if name in by_split else split_of(name) for name in (wanted or TRAIN).split("+")]
    rule = f"{where} has no such split"
    chosen = list(dict.fromkeys(lookup(by_split, name, "split", value=wanted, rule=rule) for name in names))
    left_out = {name: size for name, size in sizes.items() if name not in chosen}
    if wanted is None and left_out:
        found = ", ".join(f"{name} ({size:,} {of})" for name, size in left_out.items())
        offers = {
            VALIDATION: "; a training's --holdout {} measures val/loss on that one",
            TEST: "; jit_accel.evaluate --reference ... --split {} compares with that one",
        }
        offered = "".join(text.format(by_split[split]) for split, text in offers.items() if split in by_split)
        rule = (
            "--data_path %s: the split %s is taken, and other splits are left out: %s. --split chooses, also several "
        )
        rule += "(train+test) or all, as for classes that are named so%s"
        log.warning(rule, where, chosen[0], found, offered)
    return chosen


def have_common(wanted: str | None, other: str) -> bool:
    """Return whether two values of `--split` mean some of the same images."""
    parts = [set(canonical(split).split("+")) for split in (wanted, other)]
    return ALL in parts[0] | parts[1] or not parts[0].isdisjoint(parts[1])


def canonical(wanted: str | None) -> str:
    """Return the one spelling of all values of `--split` that mean the same: test+train for train+eval."""
    return "+".join(sorted({split_of(name) for name in (wanted or TRAIN).split("+")}))


def split_of(name: str) -> str:
    """Return the split that a word means, in any case; a name that is no such word as it is."""
    return _SPLIT_OF.get(name.lower(), name)


def find_splits(paths: Iterable[str], are_classes: bool = False) -> dict[str, tuple[str, str]]:
    """Return the split of each path, and the path without the folder of that name: train, cats/ for train/cats/.

    Paths of files, or of folders, which end in /; where these `are_classes`, a name may mean what it says: train is a
    class beside bus. Beside a test split all else is for training, beside test and train it is neither. Several folders
    of one split, as trainA and trainB, are classes: A/ and B/.
    """
    found = {path: (TRAIN, path) for path in paths}
    levels = [("", "", list(found))]
    while levels:
        place, inner, inside = levels.pop()
        children: dict[str, list[str]] = {}
        for path in inside:
            name, slash, _ = path[len(place) :].partition("/")
            children.setdefault(name + slash, []).append(path)
        rests = _named(children, are_classes)
        named = {child: split for child, (split, _) in rests.items()}
        splits, others = set(named.values()), children.keys() - named.keys()
        is_alone = len(splits) == 1 and not others  # which says nothing of what is to be left out
        if are_classes and any(name or place for name in others):
            # Beside other folders train is a class, unless it holds folders and stands beside test.
            flat = {child for child, of_child in children.items() if of_child == [place + child]}
            is_class = {
                child for child, split in named.items() if split == TRAIN and (len(splits) == 1 or child in flat)
            }
            named = {child: split for child, split in named.items() if child not in is_class}
            splits = set(named.values())
        if len(splits) > 1 and len(inside) == len(found):
            inner = ""  # folders around the splits are no classes
        kinds = Counter(split for split, rest in set(rests.values()) if rest)
        for child, of_child in children.items():
            is_removed = child in named and child.endswith("/") and not (is_alone and place)
            inner_of_child = inner if is_removed else inner + child
            if is_removed and kinds[named[child]] > 1 and rests[child][1]:
                inner_of_child += rests[child][1] + "/"
            start = place + child
            if is_removed and all(path.startswith(start + child) for path in of_child):
                start += child  # seg_train/seg_train/, as archives are unpacked
            split = named.get(child, OTHERS if named and TRAIN in splits else TRAIN)
            for path in of_child if named else ():
                found[path] = split, inner_of_child + path[len(start) :]
            if child.endswith("/") and (is_alone or (split == TRAIN and child not in named)):
                levels.append((start, inner_of_child, of_child))
    return found


def choose_folders(counts: Mapping[str, int], wanted: str | None, where: str) -> tuple[dict[str, str], str | None]:
    """Return the folders that are in the splits which `--split` means, each as it is without those that name splits.

    And what is still to be chosen from by other means: `wanted` where the names of the folders tell no splits, else
    all. `counts`: the images of each folder, which ends in /. See `choose_splits`, `find_splits`.
    """
    found, sizes = find_splits(counts, are_classes=True) if any(map(has_split_word, counts)) else {}, Counter()
    for folder, count in counts.items():
        sizes[found[folder][0] if found else TRAIN] += count
    if sizes.keys() <= {TRAIN}:
        return {folder: found[folder][1] if found else folder for folder in counts}, wanted
    chosen = choose_splits(sizes, wanted, where)
    kept = {folder: inner for folder, (split, inner) in found.items() if split in chosen}
    alike = Counter(inner for _, inner in set(found.values()))
    if len(chosen) == len(sizes) > 1 and not any(inner and alike[inner] > 1 for inner in alike):
        kept = {folder: folder for folder in kept}  # splits of the same classes are one, others are classes themselves
    return kept, ALL


def has_split_word(path: str) -> bool:
    """Return whether a path may say of what split it is."""
    return not _SPLIT_OF.keys().isdisjoint(re.split(r"[\W\d_]+", _HUMP.sub("_", path).lower()))


def _named(children: Iterable[str], are_classes: bool) -> dict[str, tuple[str, str]]:
    """Return the splits of those names that have a word for one: the last word, with digits or others around it.

    Of classes the word must be the name, as of test and test_set, or train2017 stand beside val2017, or train_photos
    beside test_photos. With each is what else the name says, "" where that has no letter.
    """
    found = {}
    for child in children:
        parts = re.split(r"([\W\d_]+)", _HUMP.sub("_", child))
        if places := [n for n, part in enumerate(parts) if part.lower() in _SPLIT_OF]:
            split = split_of(parts.pop(places[-1]))
            found[child] = split, "".join(parts)
    if are_classes:
        alike = Counter(rest.lower() for _, rest in {(split, rest.lower()) for split, rest in found.values()})
        splits = {split for split, _ in found.values()}
        is_likely = TRAIN in splits and len(splits) > 1
        found = {
            child: (split, rest)
            for child, (split, rest) in found.items()
            if _ONLY_OF_IMAGES.fullmatch(rest) or (is_likely and (alike[rest.lower()] > 1 or not _LETTER.search(rest)))
        }
    return {
        child: (split, rest.strip("-_. /") if _LETTER.search(rest) else "") for child, (split, rest) in found.items()
    }


def files_of_splits(
    files: Sequence[str], wanted: str | None, where: str, root: str | None = None
) -> tuple[list[str], str | None]:
    """Return those of the files, paths or URLs, that are of the chosen splits; see `choose_splits`.

    And what is still to be chosen from by other means, as of `choose_folders`. Folders above `root`, by default above
    those that all files are in, name no splits.
    """
    names = [os.path.normpath((file.partition("://")[2] or file).partition("?")[0]) for file in files]
    root = os.path.commonpath(map(os.path.dirname, names)) if root is None else os.path.normpath(root)
    names = [name.removeprefix(root).lstrip("/") for name in names]
    found = find_splits(names)
    sizes = Counter(found[name][0] for name in names)
    if sizes.keys() == {TRAIN}:
        return list(files), wanted
    chosen = choose_splits(sizes, wanted, where, "files")
    return [file for file, name in zip(files, names) if found[name][0] in chosen], ALL
