"""Does training on many tasks together help or harm? Paradigms compared on the same test images, per task and group.

Paradigms are "task" (one model per task), "clinical" (one per clinical group) and "all" (one for all tasks): the
question of M2DINO (arXiv 2603.18123), asked of one's own data. Scores of four kinds meet on one scale only after
normalisation: 0 is the trivial predictor, which never looks at the image, 1 is perfection.

m test images of a task, in units (patients, examinations, clips) that may serve several tasks; S runs (seeds); R
bootstrap replicates.
"""

import textwrap
from collections import namedtuple

import numpy as np

from scores.comparison import FEW_GROUPS, FLIPS, REPLICATES, estimate, number
from scores.metrics import mean_ratio
from scores.report import as_text, cell, count, p_value, shorten
from scores.stats import (class_mean_replicates, group_weights, holm, mean_replicates, replicate_scores,
                          sign_flip_class_means, sign_flip_means, sign_flip_test)

BASE = "task"  # the paradigm that the others are compared with
SCORES = {"segmentation": "Dice", "classification": "macro F1", "detection": "IoU", "regression": "MRE [pixels]"}
VALUES = {"segmentation": "Dice", "classification": "probabilities", "detection": "IoU", "regression": "error"}
COLUMNS = (("", 22), ("score [95 %]", 27), ("sd", 8), ("beats trivial", 14), (f"gain over {BASE} [95 %]", 29),
           ("p (Holm)", 12), ("mark", 5))  # and their characters on a screen

# What the values of a task's m test images are judged by. kind: of SCORES. K: classes, in segmentation with background;
# 1 in detection; points in regression. units int64 (m,): number of each image's unit among those of all tasks. labels
# int64 (m,) in classification, else None. diagonals float64 (m,): of the images, in pixels. trivial: the values of the
# predictor that never looks, kept as those of a run.
Truth = namedtuple("Truth", "kind K units labels diagonals trivial")


def normalised_score(kind, score, trivial):
    """Scores of SCORES[kind], numbers or arrays -> 0 as good as the trivial predictor, 1 perfect, never below -1.

    (score - trivial) / (1 - trivial), of an error 1 - score / trivial. Where the trivial predictor is perfect already,
    0 for a score as good and -1 for a worse one. nan stays nan.
    """
    if kind not in SCORES:
        raise ValueError(f"{kind!r} is no kind of task: expected one of {', '.join(SCORES)}")
    score, trivial = np.asarray(score, np.float64), np.asarray(trivial, np.float64)
    gained, room = gain(kind, score, trivial), (trivial if kind == "regression" else 1 - trivial)
    whole = np.where(room == 0, 1, room)
    value = np.where((room == 0) & (gained < 0), -1, gained / whole)
    return np.maximum(value, -1)[()]


def gain(kind, score, other):
    """How much better a score is than another one; an error is better if it is smaller."""
    return other - score if kind == "regression" else score - other


# ---------------------------------------------------------------- all paradigms on the same test sets

def compare_paradigms(paradigms, truth, groups, seed):
    """{paradigm: {task: values of each run}}, {task: Truth}, {task: clinical group} -> a dict of plain values, for
    `table_of_paradigms` and JSON.

    values: of segmentation "Dice" (m, K - 1), nan where the truth lacks the class; of classification "probabilities"
    (m, K); of detection "IoU" (m,); of regression "error" (m, K) pixels, nan where the truth lacks the point.
    Paradigms may be of different tasks: a group's mean is over those that a paradigm has, its gain over those that
    BASE has, too. Intervals are percentiles of a cluster bootstrap with the same units for all tasks and paradigms.
    """
    tasks = checked_tasks(paradigms, truth, groups)
    known = np.unique(np.concatenate([truth[task].units for task in tasks]))
    weights = group_weights(len(known), seed, REPLICATES)  # (1 + R, all units)
    found = {"paradigms": list(paradigms), "compared with": BASE if BASE in paradigms else None, "units": len(known),
             "tasks": {}, "groups": {}}
    normalised = {}
    for task in tasks:
        own, places = np.unique(truth[task].units, return_inverse=True)
        runs = {name: part[task] for name, part in paradigms.items() if task in part}
        about, normalised[task] = of_task(truth[task], runs, places, weights[:, np.searchsorted(known, own)], seed)
        found["tasks"][task] = {"group": groups[task], **about}
    for name in paradigms:
        correct(found["tasks"], name)
    for group in dict.fromkeys(groups[task] for task in tasks):
        own = [task for task in tasks if groups[task] == group]
        found["groups"][group] = of_tasks(own, found, normalised, truth)
    found["all tasks"] = of_tasks(tasks, found, normalised, truth)
    return found


def of_task(truth, paradigms, units, weights, seed):
    """{paradigm: values of each run}, units (m,) as columns of the weights (1 + R, G) -> what is said of the task, and
    {paradigm: normalised scores (1 + R,)}."""
    kind, several = truth.kind, weights.shape[1] > 1
    trivial = replicates_of(truth, [truth.trivial], units, weights)
    scores = {name: replicates_of(truth, runs, units, weights) for name, runs in paradigms.items()}
    normalised = {name: normalised_score(kind, score, trivial) for name, score in scores.items()}
    found = {"kind": kind, "score": SCORES[kind], "images": len(units), "units": weights.shape[1],
             "trivial": estimate(trivial, several), "paradigms": {}}
    for name, runs in paradigms.items():
        each = np.array([replicates_of(truth, [run], units, weights[:1])[0] for run in runs])  # (S,)
        over = estimate(gain(kind, scores[name], trivial), several)
        own = {"runs": len(runs), "score": estimate(scores[name], several), "sd": spread(each),
               "per run": [number(value) for value in each],
               "normalised": estimate(normalised[name], several),
               "normalised per run": [number(value) for value in normalised_score(kind, each, trivial[0])],
               "gain over trivial": over, "beats trivial": by_interval(over, "yes", "worse", "not shown")}
        if name != BASE and BASE in paradigms:
            same = np.array_equal(*(stacked(kind, own) for own in (paradigms[BASE], runs)), equal_nan=True)
            # the one network of a group of one task is both paradigms': nothing to test, nor to correct for
            p = p_of(truth, paradigms[BASE], runs, units, seed) if several and not same else np.nan
            own["gain"] = {**estimate(gain(kind, scores[name], scores[BASE]), several), "p": number(p)}
        found["paradigms"][name] = own
    return found, normalised


def replicates_of(truth, runs, units, weights):
    """Mean score of the runs in every replicate (1 + R,), the estimate first; nan where nothing is left to score."""
    values = stacked(truth.kind, runs)
    if truth.kind == "segmentation":
        return class_mean_replicates(values, units, weights)
    if truth.kind == "classification":
        return replicate_scores(truth.labels, values, units, weights, ranked=False)["macro F1"]
    return mean_replicates(values, units, weights)


def p_of(truth, a, b, units, seed):
    """Two-sided p that the runs a and b score alike."""
    a, b = stacked(truth.kind, a), stacked(truth.kind, b)
    if truth.kind == "segmentation":
        return sign_flip_class_means(a, b, units, seed, FLIPS)
    if truth.kind == "classification":
        return sign_flip_test(truth.labels, a, b, units, seed, FLIPS, ranked=False)["macro F1"]
    return sign_flip_means(a, b, units, seed, FLIPS)


def stacked(kind, runs):
    """What a kind is scored by, of S runs: (S, m, K - 1), (S, m, K) or (S, m)."""
    values = np.stack([np.asarray(run[VALUES[kind]], np.float64) for run in runs])
    return mean_ratio(np.nan_to_num(values), ~np.isnan(values)) if kind == "regression" else values  # points' mean


def correct(tasks, name):
    """Holm's correction over all tasks of a paradigm, and what it leaves of each gain or loss."""
    compared = [own["paradigms"][name]["gain"] for own in tasks.values() if "gain" in own["paradigms"].get(name, ())]
    adjusted = holm([np.nan if own["p"] is None else own["p"] for own in compared])
    for own, p in zip(compared, adjusted):
        own["p (Holm)"] = number(p)
        if np.isnan(p):
            own["mark"] = by_interval(own, "gain", "loss", "")
        else:
            own["mark"] = "" if p >= 0.05 else "gain" if own["estimate"] > 0 else "loss"


def by_interval(difference, above, below, neither):
    """The word for an interval that lies above 0, below it, or neither; without an interval neither is shown."""
    if difference["low"] is None:
        return neither
    return above if difference["low"] > 0 else below if difference["high"] < 0 else neither


def of_tasks(tasks, found, normalised, truth):
    """Of several tasks each paradigm's mean normalised score, and its gain over BASE on the tasks that both have.

    A task that cannot be scored, a segmentation of classes that no test image has, is left out. A replicate that
    draws no image of one of the tasks has no mean. A task of one unit leaves the mean without an interval.
    """
    about = {"tasks": tasks, "images": sum(found["tasks"][task]["images"] for task in tasks),
             "units": len(np.unique(np.concatenate([truth[task].units for task in tasks]))), "paradigms": {}}

    def mean(chosen, part):  # part(task) -> (1 + R,)
        values = np.mean([part(task) for task in chosen], axis=0)
        return estimate(values, all(found["tasks"][task]["units"] > 1 for task in chosen))

    for name in found["paradigms"]:
        own = [task for task in tasks if np.isfinite(normalised[task].get(name, [np.nan])[0])]
        if not own:
            continue
        per_run = [found["tasks"][task]["paradigms"][name]["normalised per run"] for task in own]
        paired = len({len(runs) for runs in per_run}) == 1  # run s of each task makes run s of the mean
        about["paradigms"][name] = {"tasks": len(own), "normalised": mean(own, lambda task: normalised[task][name]),
                                    "sd": spread(np.mean(per_run, axis=0)) if paired else None}
        both = [task for task in own if BASE in normalised[task]]
        if name != BASE and both:
            gained = mean(both, lambda task: normalised[task][name] - normalised[task][BASE])
            about["paradigms"][name]["gain"] = {**gained, "tasks": len(both),
                                                "mark": by_interval(gained, "gain", "loss", "")}
    return about


def spread(values):
    """Standard deviation over runs for JSON; of one run there is none."""
    return number(np.std(values, ddof=1)) if len(values) > 1 else None


def checked_tasks(paradigms, truth, groups):
    """The tasks of any paradigm, in the order of `truth`; ValueError where values do not fit the truth."""
    named = {task for part in paradigms.values() for task in part}
    if not named:
        raise ValueError("no paradigm has a task to compare: give the values of at least one run")
    for what, given in (("truth", truth), ("clinical group", groups)):
        if named - set(given):
            raise ValueError(f"no {what} of {', '.join(sorted(named - set(given)))}: give one for every task")
    for task in named:
        kind, m = truth[task].kind, len(truth[task].units)
        if kind not in SCORES or not m:
            raise ValueError(f"{task}: {m} test images of kind {kind!r}, needs at least one, of {', '.join(SCORES)}")
        expected = {"segmentation": (m, truth[task].K - 1), "detection": (m,)}.get(kind, (m, truth[task].K))
        lacking = np.isnan(values_of(truth[task], truth[task].trivial, expected, f"{task}, trivial predictor"))
        for name, part in paradigms.items():
            if task in part and not part[task]:
                raise ValueError(f"{task}, paradigm {name}: no run; leave the task out of this paradigm")
            for run, values in enumerate(part.get(task, ())):
                where = f"{task}, paradigm {name}, run {run}"
                if (np.isnan(values_of(truth[task], values, expected, where)) != lacking).any():
                    raise ValueError(f"{where}: {VALUES[kind]} is nan at other places than the trivial predictor's; "
                                     f"score both against the same truth")
    return [task for task in truth if task in named]


def values_of(truth, values, expected, where):
    """The array that a task is scored by, if it has the expected shape, and nan only where a truth may be missing."""
    key = VALUES[truth.kind]
    own = np.asarray(values.get(key, ()), np.float64)
    if own.shape != expected:
        raise ValueError(f"{where}: {key} of shape {own.shape}, needs {expected}: one row per test image")
    if truth.kind in ("classification", "detection") and np.isnan(own).any():
        raise ValueError(f"{where}: {key} holds nan, but every image has a truth; mend the model that gave it")
    return own


# ---------------------------------------------------------------- as text

def table_of_paradigms(found):
    """Lines of at most 120 characters: a block per clinical group, its mean first, then its tasks; last all tasks."""
    lines = [aligned([title for title, _ in COLUMNS])]
    for group, about in found["groups"].items():
        lines += ["", *mean_lines(group, about)]
        for task in about["tasks"]:
            lines += task_lines(task, found["tasks"][task])
    lines += ["", *mean_lines("all tasks", found["all tasks"])]
    for sentence in (few_units(found), nothing_compared(found)):
        lines += [""] * bool(sentence) + textwrap.wrap(sentence, 120, break_on_hyphens=False)
    return lines


def aligned(texts):
    return "".join(f"{text:{width - 1}} " for text, (_, width) in zip(texts, COLUMNS)).rstrip()


def mean_lines(name, about):
    n_tasks = len(about["tasks"])
    yield (f"{shorten(name, 40)}: mean normalised score (0 trivial, 1 perfect) of {count(n_tasks, 'task')}, "
           f"{count(about['units'], 'unit')}")
    for paradigm, own in about["paradigms"].items():
        part = f" ({own['tasks']} of {n_tasks})" if own["tasks"] < n_tasks else ""
        gained = own.get("gain")
        fewer = f"of {count(gained['tasks'], 'task')}" if gained and gained["tasks"] < own["tasks"] else ""
        yield aligned([f"  {shorten(paradigm, 18 - len(part))}{part}", cell(own["normalised"], ""),
                       as_text(own["sd"], ""), "", *gain_texts(gained, "", fewer)])


def task_lines(task, about):
    score, trivial = about["score"], about["trivial"]["estimate"]
    yield (f"  {shorten(task, 36)}: {about['kind']} by {score}, {count(about['images'], 'image')} of "
           f"{count(about['units'], 'unit')}; trivial {as_text(trivial, score)}")
    for paradigm, own in about["paradigms"].items():
        gained = own.get("gain")
        p = "" if gained is None else "-" if gained["p"] is None else p_value(gained["p (Holm)"])
        yield aligned([f"    {shorten(paradigm, 17)}", cell(own["score"], score), as_text(own["sd"], score),
                       own["beats trivial"], *gain_texts(gained, score, p)])


def gain_texts(gained, score, beside):
    return ("", beside, "") if gained is None else (cell(gained, score, signed=True), beside, gained["mark"])


def few_units(found):
    """A warning for tasks of few test units, or nothing."""
    few = [f"{task} {own['units']}" for task, own in found["tasks"].items() if own["units"] < FEW_GROUPS]
    if not few:
        return ""
    return (f"Of fewer than {FEW_GROUPS} test units, bootstrap intervals are too narrow and tests find little; of one "
            f"there is neither: {', '.join(few)}.")


def nothing_compared(found):
    if found["compared with"] is None:
        return f'There is no run of paradigm "{BASE}", one model per task, to compare with: gains cannot be told.'
    lacking = [task for task, own in found["tasks"].items() if BASE not in own["paradigms"]]
    return f'Without a run of paradigm "{BASE}" to compare with: {", ".join(lacking)}.' if lacking else ""


def methods_sentences(found):
    """How intervals, tests, normalisation and marks were made: for a methods section."""
    text = (
        f"Tasks were scored by the mean over foreground classes of the mean Dice of the images that have the class "
        f"(segmentation), macro F1 (classification), mean IoU (detection), and the mean radial error in pixels over an "
        f"image's points, then over images (regression). Scores are means over runs, sd is their standard deviation. "
        f"Intervals are 95 % percentile intervals of a cluster bootstrap over the {count(found['units'], 'unit')} "
        f"(patients, examinations or clips) of the test images of all tasks ({REPLICATES:,} replicates, the same units "
        f"for all tasks and paradigms, so that an image that serves two tasks is drawn for both); runs are not "
        f"resampled: the intervals are about other patients, not about other seeds. Normalised scores are (score - "
        f"trivial) / (1 - trivial), of an error 1 - error / trivial, and never below -1: 0 is the trivial predictor, "
        f"which never looks at the image (majority class, mean box, mean landmarks, mean mask), 1 is perfection; the "
        f"trivial predictor's score is resampled, too. A model beats it where the interval of the difference lies "
        f"above 0.")
    if found["compared with"] is None:
        return f"{text} {nothing_compared(found)}"
    return (
        f"{text} A gain is the score less that of one model per task, of an error the reverse, so that a positive one "
        f"is better. Each task's gain was tested by a two-sided sign-flip test over units (up to {FLIPS:,} flips), "
        f"with Holm's correction over all tasks of a paradigm but those whose model is the same in both, and is marked "
        f"as gain or loss where that p is below 0.05; where there is no p, and for means over tasks, where the "
        f"interval excludes 0, without a correction.")
