"""What a comparison of classifiers says: scores of class probabilities, each class, each value of a column."""

import numpy as np

from scores import comparison
from scores.comparison import describe, number
from scores.metrics import CLASSIFICATION_SCORES, confusion, per_class
from scores.report import COLUMN, SIDE_BY_SIDE, as_text, cell, row, shorten
from scores.stats import replicate_scores, sign_flip_test

PRIMARY = "macro F1"  # what epochs and heads are chosen by


def compare(models, labels, groups, classes, seed, tests=True):
    """models {name: (scores (S, n, K), ranked)}, labels (n,), groups (n,), class names (K,) -> comparison.describe's
    dict, with the classes, each model's mean confusion and what it makes of each class."""
    groups = np.unique(groups, return_inverse=True)[1]

    def runs_of(model):
        scores, ranked = model
        return [(run[None], ranked) for run in scores]

    def replicates_of(model, weights):
        scores, ranked = model
        return replicate_scores(labels, scores, groups, weights, ranked)

    def tests_of(a, b):
        return sign_flip_test(labels, a[0], b[0], groups, seed, comparison.FLIPS, a[1] and b[1])

    found = describe(models, runs_of, replicates_of, tests_of, groups, seed, tests)
    for name, (scores, _) in models.items():
        counts = confusion(labels, scores.argmax(2), len(classes))  # (S, K, K)
        pooled = per_class(counts.sum(0))
        found["models"][name].update({
            "confusion, mean of runs": counts.mean(0).tolist(),
            "per class, pooled over runs": {label: {key: number(values[k]) for key, values in pooled.items()}
                                            for k, label in enumerate(classes)}})
    return {**found, "classes": list(classes), "order": list(CLASSIFICATION_SCORES), "primary": PRIMARY}


def by_column(models, labels, groups, classes, values, seed):
    """{value of the column: what `compare` finds on its images alone}, without tests."""
    found = {}
    for value in sorted(set(values)):
        own = np.array([other == value for other in values])
        found[value] = compare({name: (scores[:, own], ranked) for name, (scores, ranked) in models.items()},
                               labels[own], groups[own], classes, seed, tests=False)
    return found


# ---------------------------------------------------------------- as text

def class_table(found):
    """Lines: F1 of each class, pooled over runs, a row per class and a column per model, four of them side by side."""
    names, lines = list(found["models"]), []
    for start in range(0, len(names), SIDE_BY_SIDE):
        shown = names[start:start + SIDE_BY_SIDE]
        lines.append(row("F1 of each class", [shorten(name, COLUMN - 1) for name in shown]))
        for label in found["classes"]:
            values = [found["models"][name]["per class, pooled over runs"][label]["f1"] for name in shown]
            lines.append(row(f"  {label}", [as_text(value, "F1") for value in values]))
    return lines


def by_table(column, found):
    """Lines: per value of the column the images, groups, and each model's macro F1 and balanced accuracy."""
    shown = ("balanced accuracy", PRIMARY)
    lines = [row(f"by {column}", ("images, groups", "model", *shown))]
    for value, part in found.items():
        for i, (name, model) in enumerate(part["models"].items()):
            first = (value, f"{part['images']:,}, {part['groups']:,}") if i == 0 else ("", "")
            lines.append(row(f"  {first[0]}", (first[1], shorten(name, COLUMN - 1),
                                               *(cell(model["scores"][score], score) for score in shown))))
    return lines
