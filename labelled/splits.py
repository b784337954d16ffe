"""Which group of images is for train, for val, for test: what the source says, and what it leaves open drawn by group.

    splits = split_groups(labelled, seed=0)  # of a labels.LabelledSet, or what has its labels, groups, splits and names
    notes = check_splits(labelled, splits)
"""

import numpy as np

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
               "test": "test", "testing": "test"}  # of a column or of folders, in any case
DRAWS = 100  # of splits, at most, until every class reaches all of them


def split_groups(labelled, seed=0, val=0.2, test=0.2):
    """The split of each image, "train", "val" or "test": what the source says, and what it leaves open drawn by group.

    Without splits, shares `val` and `test` of the groups are drawn; with train and test, a share `val` of train's
    groups. Depends on `seed`, group names and labels only, not on the files' order.
    """
    if min(val, test) <= 0 or val + test >= 1:
        raise ValueError(f"shares of val and test groups must be above 0 and leave some to train, not {val} and {test}")
    if labelled.splits is None:
        return _draw(labelled.groups, labelled.labels, seed, {"train": 1 - val - test, "test": test, "val": val})
    there = [split for split in SPLITS if split in labelled.splits]
    for needed in ("train", "test"):
        if needed not in there:
            raise ValueError(f"the splits name {' and '.join(there)} but no {needed} images; name some, or leave the "
                             f"splits out to have all of them drawn")
    if "val" in there:
        return list(labelled.splits)
    drawn, splits = np.flatnonzero(np.array(labelled.splits) == "train"), np.array(labelled.splits)
    groups, labels = ([texts[i] for i in drawn] for texts in (labelled.groups, labelled.labels))
    splits[drawn] = _draw(groups, labels, seed, {"train": 1 - val, "val": val})
    return splits.tolist()


def _draw(groups, labels, seed, shares):
    """Splits {name: share of the groups}, the one that needs a class most first -> the name for each image.

    Several draws where groups hold several classes and a first one leaves a class out of a split.
    """
    groups, labels = (np.unique(texts, return_inverse=True)[1] for texts in (groups, labels))
    has = np.zeros((groups.max() + 1, labels.max() + 1), bool)  # (G, K)
    has[groups, labels] = True
    best, fewest, unavoidable = None, np.inf, np.maximum(len(shares) - has.sum(0), 0).sum()
    for draw in range(DRAWS):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, draw])))
        drawn = _stratify(has, list(shares.values()), rng)
        missing = [~has[drawn == split].any(0) for split in range(len(shares))]  # bool (K,) each
        weight = 1000 * missing[0].sum() + sum(classes.sum() for classes in missing[1:])  # no training: an error
        if weight < fewest:
            best, fewest = drawn, weight
        if fewest == unavoidable:
            break
    return np.array(list(shares))[best[groups]].tolist()


def _stratify(has, shares, rng):
    """Split number (G,) of groups that hold classes (G, K) bool: iterative stratification (Sechidis et al. 2011).

    The classes of fewest groups go first. Of a class, each split gets a group, as long as there are groups; then a
    group goes where most of this class are wanting, then where most groups are.
    """
    drawn, order, splits = np.full(len(has), -1), rng.permutation(len(has)), range(len(shares))
    wanted = np.outer(shares, has.sum(0))  # (S, K) groups
    reached = np.zeros(wanted.shape, bool)
    room = np.array(shares) * len(has)
    for k in np.argsort(has.sum(0), kind="stable"):
        for group in order[has[order, k] & (drawn[order] < 0)]:
            split = max(splits, key=lambda s: (not reached[s, k], wanted[s, k] if reached[s, k] else -s, room[s]))
            drawn[group] = split
            wanted[split] -= has[group]
            reached[split] |= has[group]
            room[split] -= 1
    return drawn


def check_splits(labelled, splits):
    """Sentences on classes that val or test lack, for the caller to print; ValueError for splits that prove nothing:
    a group in two of them, an empty one, a class that is not in train, one class only."""
    home = {}
    for group, split, name in zip(labelled.groups, splits, labelled.names):
        other, there = home.setdefault(group, (split, name))
        if other != split:
            raise ValueError(f"group {group!r} is in {other} ({there}) and in {split} ({name}): splits must not share "
                             f"a group; mend the splits, or name groups by --group_regex or a group column")
    classes = {split: {label for label, own in zip(labelled.labels, splits) if own == split} for split in SPLITS}
    every = sorted(set(labelled.labels))
    if len(every) < 2:
        raise ValueError(f"all images are of one class, {every[0]!r}: a classifier needs two or more")
    for split in SPLITS:
        if not classes[split]:
            raise ValueError(f"no image is in {split}: {len(home)} groups by {labelled.grouped_by} do not fill train, "
                             f"val and test")
    for label in every:
        if label not in classes["train"]:
            name, split = next((name, split) for name, split, own in zip(labelled.names, splits, labelled.labels)
                               if own == label)
            raise ValueError(f"class {label!r} is in {split} ({name}) but not in train: it cannot be learned; give "
                             f"train images of it, or leave it out")
    return [f"class {label!r} has no {split} image"
            for split in SPLITS for label in every if label not in classes[split]]
