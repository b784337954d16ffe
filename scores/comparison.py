"""Models x scores on one test set, with intervals and paired tests: the one description that all reports print.

A dict of plain values, ready for JSON: of each model its scores (estimate, low, high), those of each run, standard
errors; of the first model minus each other one the difference, its interval, p, p after Holm's correction, and what
difference could have been found at all.
"""

import numpy as np

from scores.stats import detectable_difference, group_weights, holm, interval, standard_error

REPLICATES, FLIPS = 2000, 10_000  # of the cluster bootstrap, of the sign-flip test
FEW_GROUPS = 30  # below: a warning


def describe(models, runs_of, replicates_of, tests_of, groups, seed, tests=True):
    """models {name: whatever the next three take}, groups (n,) numbers from 0 -> {"images", "groups", "models",
    "differences"}.

    runs_of(model) yields its runs, each as a model of one run; replicates_of(model, weights) -> {score: (1 + R,)}, the
    estimate first; tests_of(a, b) -> {score: two-sided p that they score alike}. Intervals are percentiles of a cluster
    bootstrap with the same groups for all models. One group tells nothing of others: no interval, no p.
    """
    n_groups = int(groups.max()) + 1
    weights, several = group_weights(n_groups, seed, REPLICATES), n_groups > 1
    replicates = {name: replicates_of(model, weights) for name, model in models.items()}
    found = {"images": len(groups), "groups": n_groups, "models": {}}
    for name, model in models.items():
        runs = [replicates_of(run, weights[:1]) for run in runs_of(model)]
        found["models"][name] = {
            "runs": len(runs),
            "scores": {score: estimate(values, several) for score, values in replicates[name].items()},
            "per run": {score: [number(run[score][0]) for run in runs] for score in replicates[name]},
            "standard error": {score: number(standard_error(values)) if several else None
                               for score, values in replicates[name].items()}}
    first, *others = models
    p = {name: tests_of(models[first], models[name]) for name in others if tests and several}
    return {**found, "differences": differences(replicates, p, several)}


def differences(replicates, p, several):
    """What is said of the first model minus each other one, {name: {score: ...}}: replicates {name: {score: (1 + R,)}},
    p {name: {score: p}} of those that were tested."""
    (_, first), *others = replicates.items()
    found = {name: {} for name, _ in others}
    for score in first:
        tested = np.array([p[name][score] if name in p else np.nan for name, _ in others])
        for (name, other), value, adjusted in zip(others, tested, holm(tested)):
            difference = first[score] - other[score]
            detectable = detectable_difference(difference)
            found[name][score] = {
                **estimate(difference, several), "p": number(value), "p (Holm)": number(adjusted),
                "detectable": number(detectable) if several and detectable > 1e-9 else None}
    return found


def estimate(replicates, several):
    """Replicates (1 + R,) -> estimate, low, high for JSON; of one group there are no bounds."""
    return bounded(interval(replicates), several)


def bounded(found, several):
    middle, low, high = map(number, found)
    if middle is None or not several:
        low = high = None
    return {"estimate": middle, "low": low, "high": high}


def number(value):
    """A float for JSON, which knows no nan."""
    return float(value) if np.isfinite(value) else None


# ---------------------------------------------------------------- in sentences

STATISTICS = (f"Intervals are 95 % percentile intervals of a cluster bootstrap over test groups ({REPLICATES:,} "
              f"replicates, the same groups for all models). Differences were tested by two-sided sign-flip tests over "
              f"groups (up to {FLIPS:,} flips), with Holm's correction over the comparisons, for each score apart.")


def detectable_sentence(found):
    """What the test set could have shown at all: from the standard error of the differences, or of the one score."""
    primary = found["primary"]
    parts = [f"{name} {scores[primary]['detectable']:.3f}" for name, scores in found["differences"].items()
             if scores[primary]["detectable"] is not None]
    if parts:
        return (f"Smallest difference in {primary} that a two-sided 5 % test, before any correction, finds with 80 % "
                "power: " + ", ".join(parts) + ".")
    name, model = next(iter(found["models"].items()))
    error = model["standard error"][primary]
    return f"Standard error of the {primary} of {name} over groups: {'unknown' if error is None else f'{error:.3f}'}."


def few_groups(found):
    """A warning where the test set has few groups, or nothing."""
    G = found["groups"]
    if G == 1:
        return "The test set is one group: nothing can be said of others, there is no interval and no test. "
    if G >= FEW_GROUPS:
        return ""
    return (f"Only {G} test groups: of so few, bootstrap intervals are too narrow, and the smallest p of a sign-flip "
            f"test is {2 / 2 ** G:.2g}. ")
