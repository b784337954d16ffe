"""Which frames of a pile of files stay in a pack: hold-outs, colour, duplicates, the longest clips."""

import contextlib
import os

import numpy as np

from frames.images import ROW, decode_all
from frames.leakage import look_alikes, near_duplicates, salted
from frames.lists import IMAGE_GROUPS

REASONS = ("", "held out (identical image)", "held out (looks like a held-out image)", "held out (group)", "in colour",
           "equal to an earlier image", "nearly equal to an earlier image of its group", "over --max_per_group")
HELD_GROUP = 3


class Holdout:
    """Groups, folders and images that must stay out of a pack: salted digests, real paths, hashes.

    paths: of the images; names: of groups, as text; folders: real paths of those that are groups by themselves.
    """

    def __init__(self, paths, names, folders, salt, workers):
        self.folders, rows = folders, [np.zeros(0, ROW)]
        with contextlib.closing(decode_all(paths, 1, False, salt, workers)) as decoded:
            for _, some, _, failed in decoded:
                if failed:
                    number, _, reason = failed[0]
                    raise ValueError(f"--holdout: cannot read {paths[number]} ({reason}), so its copies cannot be kept "
                                     f"out; mend or remove it (paths in a list are relative to the list's folder)")
                rows.append(some)
        rows = np.concatenate(rows)
        self.hashes, self.looks = np.unique(rows["hash"]), np.unique(rows["looks"], axis=0)
        names = np.array([salted(name, salt) for name in names], np.uint64)
        self.groups = np.setdiff1d(np.concatenate((names, rows["patient"], rows["study"])), np.zeros(1, np.uint64))

    def known_groups(self, images, digests):
        """Digests of the listing's groups that are held out by name or folder."""
        held = self.groups
        if images.grouped_by.startswith("image"):
            held = held[:0]
        elif images.grouped_by == "parent folder":
            folders = {digest: os.path.dirname(path) for digest, path in zip(digests.tolist(), images.paths)}
            inside = [digest for digest, folder in folders.items() if os.path.realpath(folder) in self.folders]
            held = np.append(held, np.array(inside, np.uint64))
        return np.intersect1d(held, digests)


def groups_of(rows, images, digests):
    """Salted group of each row (n,), whether it has a patient's or clip's name (n,), how groups were found, in words.

    A DICOM file's group is its patient, or its study where the patient is not named or all are called alike, as
    anonymised ones are. A group column or --group_regex goes first.
    """
    groups, dicom = digests[rows["image"]], (rows["patient"] > 0) | (rows["study"] > 0)
    if images.grouped_by not in ("parent folder", IMAGE_GROUPS):
        return groups, np.ones(len(rows), bool), images.grouped_by
    if not dicom.any():
        return groups, dicom, images.grouped_by
    column = "patient" if len(np.unique(rows["patient"][dicom])) > 1 else "study"
    owner = np.where(rows[column] > 0, rows[column], np.maximum(rows["patient"], rows["study"]))
    words = f"DICOM {column}" if dicom.all() else f"DICOM {column}, else {images.grouped_by}"
    return np.where(dicom, owner, groups), dicom, words


def choose(rows, groups, named, held, held_groups, canvas, dedup, max_per_group, drop_colour):
    """Which rows stay -> why the others go (n,), a number in REASONS, and counts for pack.json.

    groups (n,), salted; named (n,): whether a held-out image takes its group along; held_groups: out already.
    """
    why, counts = np.zeros(len(rows), np.int8), {}

    def drop(name, which, reason, wanted=True):
        """Count what `which` (n,) bool has left; drop it too if that is wanted."""
        which = which & (why == 0)
        counts[name] = int(which.sum())
        if wanted:
            why[which] = reason

    identical = np.isin(rows["hash"], held.hashes)
    alike = look_alikes(rows["looks"], held.looks)
    # a blank frame is identical to blank frames of other patients: it goes, its group stays
    blank = rows["sum"] ** 2 == rows["squares"] * canvas ** 2
    held_groups = np.union1d(held_groups, groups[(identical | alike) & named & ~blank])
    counts["held_groups"] = len(held_groups)
    drop("held_out_identical", identical, 1)
    drop("held_out_alike", alike, 2)
    by_name = np.isin(rows["patient"], held.groups) | np.isin(rows["study"], held.groups)  # whatever the groups are
    drop("held_out_by_group", np.isin(groups, held_groups) | by_name, HELD_GROUP)
    drop("colour", rows["colour"] > 0, 4, drop_colour)

    left = np.flatnonzero(why == 0)
    equal, near, over = np.zeros((3, len(rows)), bool)
    equal[left], near[left] = near_duplicates(rows["looks"][left], rows["hash"][left], groups[left])
    _, first, which = np.unique(rows["hash"][left], return_index=True, return_inverse=True)
    counts["equal_across_groups"] = int((groups[left] != groups[left][first[which]]).sum())
    drop("equal", equal, 5, dedup)
    drop("near", near, 6, dedup)
    if max_per_group:
        left = np.flatnonzero(why == 0)
        over[left] = ~spread(groups[left], max_per_group)
    drop("over_max_per_group", over, 7)
    return why, counts


def spread(groups, most):
    """bool (n,): at most `most` of each group, evenly spaced in their order."""
    order = np.argsort(groups, kind="stable")
    _, counts = np.unique(groups, return_counts=True)
    size, rank = np.repeat(counts, counts), np.arange(len(groups)) - np.repeat(np.cumsum(counts) - counts, counts)
    keep = np.empty(len(groups), bool)
    keep[order] = (rank + 1) * most // size > rank * most // size
    return keep


# ---------------------------------------------------------------- what is said about it

def list_reasons(rows, reason, by_listing, failed, unread, images):
    """(name, reason) of all that is left out, file by file; by_listing (n,): whether a row's group is its file's."""
    several = np.bincount(rows["image"], minlength=len(images.names)) > 1
    entries = [(image, frame, f"from frame {frame} on: {why}" if frame else why) for image, frame, why in failed]
    entries += [(image, 0, f"held out (group {images.groups[image]})") for image in unread.tolist()]
    for number in np.flatnonzero(reason).tolist():
        image, frame, why = int(rows["image"][number]), int(rows["frame"][number]), REASONS[reason[number]]
        if reason[number] == HELD_GROUP and by_listing[number]:
            why = f"held out (group {images.groups[image]})"
        entries.append((image, frame, f"frame {frame}: {why}" if several[image] else why))
    return [*images.closed, *((images.names[image], why) for image, _, why in sorted(entries))]


def report(info, out, log):
    """Say what a pack holds, what was found in the images, and what was left out."""
    made, counts = info["recipe"], {key: f"{value:,}" for key, value in info.items() if type(value) is int}
    log(f"{counts['images']} images, {counts['groups']} groups by {info['grouped_by']} -> {out} "
        f"({size_text(info['images'] * info['canvas'] ** 2)})")
    if info["held_against"]:
        log(f"held out: {counts['held_out_by_group']} images of {counts['held_out_groups']} groups, "
            f"{counts['held_out_identical']} identical images, {counts['held_out_alike']} look-alikes")
        if info["held_out_by_group"] and info["grouped_by"] == "parent folder":
            log("  whole folders are held out; if a folder is not one patient or clip, name groups by --group_regex")
        elif info["groups_missed"]:
            log(f"  WARNING: the source's groups go by {info['grouped_by']}: other images of held-out patients or "
                f"clips may remain in; name groups by --group_regex or a group column")
    if info["equal"] or info["near"]:
        log(f"duplicates: {counts['equal']} images equal an earlier one ({counts['equal_across_groups']} one of "
            f"another group), {counts['near']} nearly equal one of their group: "
            + ("left out" if made["dedup"] else "kept; --dedup leaves them out"))
    if info["colour"]:
        log(f"colour: {counts['colour']} images: "
            + ("left out" if made["drop_colour"] else "kept; --drop_colour leaves them out"))
    if info["over_max_per_group"]:
        log(f"over --max_per_group {made['max_per_group']}: {counts['over_max_per_group']} images left out")
    if info["skipped"]:
        log(f"skipped: {counts['skipped']} unreadable images")
    if info["closed"]:
        log(f"skipped: {counts['closed']} folders that could not be opened")
    if os.path.getsize(os.path.join(out, "skipped.txt")):
        log(f"  listed in {os.path.join(out, 'skipped.txt')}")


def size_text(count):
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
