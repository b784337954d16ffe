"""What a comparison of segmenters says: scores of masks and of head circumferences, for report.py's tables."""

import numpy as np

from scores import comparison
from scores.comparison import bounded, describe, number
from scores.metrics import MASK_SCORES, dice, iou
from scores.report import COLUMN, as_text, cell, row, shorten
from scores.stats import (class_mean_replicates, group_weights, limits_of_agreement, mean_replicates, pooled_replicates,
                          sign_flip_class_means, sign_flip_means, sign_flip_pooled)

PRIMARY = "Dice"  # what comes first; steps are chosen by the pooled one
OVERLAPS = ("Dice", "IoU")  # the background has these, too
POOLED = {"pooled Dice": (dice, 1), "pooled IoU": (iou, 1),  # of counts, from this class on
          "pooled Dice with background": (dice, 0), "pooled IoU with background": (iou, 0)}
CIRCUMFERENCE = "circumference error [mm]"


def compare_masks(models, groups, classes, unit, seed, measured=None, tests=True):
    """Segmenters on one test set, S runs each, n images, K classes of which 0 is the background -> a dict as of
    report.compare, for `table`, `latex` and JSON.

    models {name: {"counts": int64 (S, n, K, 3) pixels in both, in the truth, in the prediction; "values": {score of
    MASK_SCORES: (S, n, K), nan where the truth lacks the class}; "circumference": (S, n) mm, nan without an ellipse}},
    the last only where the heads were measured: measured (n,) mm. unit: of HD95, "mm" or "pixels".

    Scores are means over foreground classes: of each class's mean over the images that have it, or, pooled, of its
    score of all pixels together; overlaps also with the background as one more class. A circumference that
    could not be told is off by all that was measured. Intervals and tests as in report.compare.
    """
    groups = np.unique(groups, return_inverse=True)[1]

    def replicates_of(model, weights):
        return {name: replicates(values, groups, weights, *last)
                for name, (replicates, _, values, last) in scored(model, unit, measured).items()}

    def tests_of(a, b):
        others = scored(b, unit, measured)
        return {name: test(values, others[name][2], groups, seed, comparison.FLIPS, *last)
                for name, (_, test, values, last) in scored(a, unit, measured).items()}

    found = describe(models, runs_of, replicates_of, tests_of, groups, seed, tests)
    for name, model in models.items():
        found["models"][name]["per class"] = class_scores(model, classes, unit)
        if measured is not None:
            found["models"][name]["circumference [mm]"] = agreement(model, measured, groups, seed)
    order = ["Dice", "IoU", "pooled Dice", with_unit("HD95", unit), "surface Dice"]
    return {**found, "classes": list(classes), "unit": unit, "primary": PRIMARY,
            "order": order + [CIRCUMFERENCE] * (measured is not None)}


def with_unit(score, unit):
    return f"{score} [{unit}]" if score == "HD95" else score


def runs_of(model):
    """The model's runs, each as a model of one run."""
    for s in range(len(model["counts"])):
        yield {name: {score: own[s:s + 1] for score, own in part.items()} if name == "values" else part[s:s + 1]
               for name, part in model.items()}


def scored(model, unit, measured):
    """{score: (function of its replicates, of its test, what both take of the model, their last arguments)}."""
    values, counts = model["values"], model["counts"]
    means = class_mean_replicates, sign_flip_class_means
    found = {with_unit(score, unit): (*means, values[score][..., 1:], ()) for score in MASK_SCORES}
    for score in OVERLAPS:
        found[f"{score} with background"] = (*means, values[score], ())
    for name, (score, first) in POOLED.items():
        found[name] = pooled_replicates, sign_flip_pooled, counts[:, :, first:], (score,)
    if measured is not None:
        found[CIRCUMFERENCE] = mean_replicates, sign_flip_means, circumference_error(model, measured), ()
    return found


# ---------------------------------------------------------------- each class, the heads

def class_scores(model, classes, unit):
    """{class: its means over images and runs, pooled Dice, images that have it, and in what share of the others it is
    predicted}."""
    counts, found = model["counts"], {}
    for k, label in enumerate(classes):
        present = counts[0, :, k, 1] > 0  # (n,)
        means = {with_unit(score, unit): known_mean(model["values"][score][..., k]) for score in MASK_SCORES}
        found[label] = {**means, "pooled Dice": known_mean(dice(counts[:, :, k].sum(1))), "images": int(present.sum()),
                        "false alarms": known_mean(np.float64(counts[:, ~present, k, 2] > 0))}
    return found


def known_mean(values):
    """Mean of what is not nan, for JSON."""
    values = values[~np.isnan(values)]
    return number(values.mean()) if len(values) else None


def circumference_error(model, measured):
    """Absolute error (S, n) in mm; nan where nothing was measured."""
    return np.where(np.isnan(model["circumference"]), measured, np.abs(model["circumference"] - measured))


def agreement(model, measured, groups, seed):
    """Bias and limits of agreement of single runs, predicted minus measured; heads without an ellipse are left out, and
    counted over all runs."""
    difference = model["circumference"] - measured  # (S, n)
    known, heads, n_groups = ~np.isnan(difference), ~np.isnan(measured), int(groups.max()) + 1
    found = {"heads": int(heads.sum()), "no ellipse": int((~known[:, heads]).sum())}
    if not known.any():
        return {**found, **dict.fromkeys(("bias", "lower", "upper"), bounded((np.nan,) * 3, n_groups > 1))}
    weights = group_weights(n_groups, seed, comparison.REPLICATES)
    limits = limits_of_agreement(difference[known], weights, np.broadcast_to(groups, known.shape)[known])
    return {**found, **{name: bounded(values, n_groups > 1) for name, values in limits.items()}}


# ---------------------------------------------------------------- as text

def mask_class_table(found):
    """Lines: of each class but the background how many images have it, and each model's Dice, HD95 and false alarms."""
    distance = with_unit("HD95", found["unit"])
    lines = [row("class, images with it", ("model", "Dice", distance, "false alarms"))]
    for label in found["classes"][1:]:
        for i, (name, model) in enumerate(found["models"].items()):
            own = model["per class"][label]
            texts = [as_text(own[score], score) for score in ("Dice", distance)]
            alarms = "-" if own["false alarms"] is None else (
                f"{own['false alarms']:.3f} of {found['images'] - own['images']:,}")
            lines.append(row("" if i else f"  {label}, {own['images']:,}", (shorten(name, COLUMN - 1), *texts, alarms)))
    return lines


def circumference_table(found):
    """Lines: each model's bias and limits of agreement of head circumferences, and heads without an ellipse."""
    lines = [row("circumference [mm]", ("bias", "lower limit", "upper limit", "no ellipse"))]
    for name, model in found["models"].items():
        own = model["circumference [mm]"]
        texts = [cell(own[key], CIRCUMFERENCE, signed=True) for key in ("bias", "lower", "upper")]
        lines.append(row(name, (*texts, f"{own['no ellipse']:,} of {own['heads'] * model['runs']:,}")))
    return lines
