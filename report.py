"""What a comparison of models says, and how: tables with intervals and paired tests, JSON, LaTeX, a methods text."""

import json
import os
import re
import sys

import numpy as np
import PIL
import torch

from metrics import (CLASSIFICATION_SCORES, confusion, detectable_difference, group_weights, holm, interval, per_class,
                     replicate_scores, sign_flip_test)
from runtime import git_commit

REPLICATES, FLIPS = 2000, 10_000  # of the cluster bootstrap, of the sign-flip test
PRIMARY = "macro F1"  # what epochs and heads are chosen by, and what LaTeX tests
COLUMN = 24  # characters of a column


# ---------------------------------------------------------------- scores of all models on one test set

def compare(models, labels, groups, seed):
    """models {name: (scores (S, n, K), ranked)}, labels (n,), groups (n,) -> a dict of plain values, for `table`,
    `latex` and JSON.

    Intervals are percentiles of a cluster bootstrap with the same groups for all models. The first model is compared
    with each other one: difference, interval, p of a sign-flip test over groups, and p after Holm's correction over
    these comparisons, for each score apart.
    """
    groups = np.unique(groups, return_inverse=True)[1]
    weights = group_weights(groups.max() + 1, seed, REPLICATES)
    replicates = {name: replicate_scores(labels, scores, groups, weights, ranked)
                  for name, (scores, ranked) in models.items()}
    found = {"images": len(labels), "groups": int(groups.max()) + 1, "models": {}, "differences": {}}
    for name, (scores, ranked) in models.items():
        runs = [replicate_scores(labels, run[None], groups, weights[:1], ranked) for run in scores]
        K = scores.shape[2]
        counts = confusion(labels, scores.argmax(2), K)  # (S, K, K)
        found["models"][name] = {
            "runs": len(scores),
            "scores": {score: three(replicates[name][score]) for score in CLASSIFICATION_SCORES},
            "per run": {score: [number(run[score][0]) for run in runs] for score in CLASSIFICATION_SCORES},
            "confusion, mean of runs": counts.mean(0).tolist(),
            "per class, pooled over runs": {key: [number(value) for value in values]
                                            for key, values in per_class(counts.sum(0)).items()},
            "standard error": {score: number(standard_error(replicates[name][score]))
                               for score in CLASSIFICATION_SCORES}}
    first, *others = models
    tests = {}
    for name in others:
        (a, ranked_a), (b, ranked_b) = models[first], models[name]
        tests[name] = sign_flip_test(labels, a, b, groups, seed, FLIPS, ranked_a and ranked_b)
    for score in CLASSIFICATION_SCORES:
        corrected = holm(np.array([tests[name][score] for name in others]))
        for name, p in zip(others, corrected):
            difference = replicates[first][score] - replicates[name][score]
            found["differences"].setdefault(name, {})[score] = {
                **three(difference), "p": number(tests[name][score]), "p (Holm)": number(p),
                "detectable": number(detectable_difference(difference))}
    return found


def number(value):
    """A float for JSON, which knows no nan."""
    return float(value) if np.isfinite(value) else None


def standard_error(replicates):
    drawn = replicates[1:][~np.isnan(replicates[1:])]
    return drawn.std(ddof=1) if len(drawn) > 1 else np.nan


def three(replicates):
    if not np.isfinite(replicates[0]):
        return dict.fromkeys(("estimate", "low", "high"))
    return dict(zip(("estimate", "low", "high"), map(number, interval(replicates))))


# ---------------------------------------------------------------- as text

def shorten(name, width):
    return name if len(name) <= width else name[:width // 2 - 1] + "…" + name[-(width - width // 2):]


def cell(found, signed=False):
    if found["estimate"] is None:
        return "-"
    form = "{:+.3f} [{:+.3f}, {:+.3f}]" if signed else "{:.3f} [{:.3f}, {:.3f}]"
    return form.format(found["estimate"], found["low"], found["high"])


def row(title, cells):
    return f"{shorten(title, COLUMN - 1):{COLUMN}}" + "".join(f"{text:{COLUMN}}" for text in cells).rstrip()


def table(found):
    """Lines: a row per model, then the first model minus each other one, with p before and after Holm's correction."""
    lines = [row("", CLASSIFICATION_SCORES)]
    for name, model in found["models"].items():
        lines.append(row(name, [cell(model["scores"][score]) for score in CLASSIFICATION_SCORES]))
        if model["runs"] > 1:
            runs = [model["per run"][score] for score in CLASSIFICATION_SCORES]
            lines.append(row(f"  sd of {model['runs']} runs",
                             ["-" if None in values else f"{np.std(values, ddof=1):.3f}" for values in runs]))
    if found["differences"]:
        lines.append(f"{shorten(next(iter(found['models'])), 100)} minus ...")
    for name, scores in found["differences"].items():
        lines.append(row(f"  {name}", [cell(scores[score], signed=True) for score in CLASSIFICATION_SCORES]))
        lines.append(row("    p, and after Holm", [p_text(scores[score]) for score in CLASSIFICATION_SCORES]))
    return lines


def p_text(found):
    return "-" if found["p"] is None else f"{p_value(found['p'])}, {p_value(found['p (Holm)'])}"


def p_value(p):
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"


def by_column(models, labels, groups, values, seed):
    """{value of the column: what `compare` finds on its images alone} (differences and all)."""
    found = {}
    for value in sorted(set(values)):
        own = np.array([other == value for other in values])
        found[value] = compare({name: (scores[:, own], ranked) for name, (scores, ranked) in models.items()},
                               labels[own], groups[own], seed)
    return found


def by_table(column, found):
    """Lines: per value of the column the images, groups, and each model's macro F1 and balanced accuracy."""
    shown = ("balanced accuracy", PRIMARY)
    lines = [row(f"by {column}", ("images, groups", "model", *shown))]
    for value, part in found.items():
        for i, (name, model) in enumerate(part["models"].items()):
            first = (value, f"{part['images']:,}, {part['groups']:,}") if i == 0 else ("", "")
            lines.append(row(f"  {first[0]}", (first[1], shorten(name, COLUMN - 1),
                                               *(cell(model["scores"][score]) for score in shown))))
    return lines


# ---------------------------------------------------------------- as LaTeX

def escape(text):
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
               ">": r"\textgreater{}", "…": r"\ldots{}", "[": "{[}",  # after \\ it would begin an argument
               **{letter: "\\" + letter for letter in "&%$#_{}"}}
    return re.sub("-(?=-)", "-{}", "".join(special.get(letter, letter) for letter in text))  # no dash of two hyphens


def latex(found, methods, script):
    """The table, the size of the test set, the smallest detectable difference and the methods text, for any document
    class and no further package."""
    def latex_cell(value):
        if value["estimate"] is None:
            return "--"
        return f"{value['estimate']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"

    names = list(found["models"])
    lines = [f"% written by {script}", r"\begin{table}", r"\centering\small",
             r"\begin{tabular}{l" + "c" * len(CLASSIFICATION_SCORES) + "c}", r"\hline",
             " & ".join(["model", *map(escape, CLASSIFICATION_SCORES), f"p ({escape(PRIMARY)})"]) + r" \\", r"\hline"]
    for name in names:
        scores, difference = found["models"][name]["scores"], found["differences"].get(name)
        p = "--" if difference is None or difference[PRIMARY]["p"] is None else escape(p_value(difference[PRIMARY]["p (Holm)"]))
        lines.append(" & ".join([escape(name), *(latex_cell(scores[score]) for score in CLASSIFICATION_SCORES), p]) + r" \\")
    lines += [r"\hline", r"\end{tabular}",
              r"\caption{" + escape(f"Test set of {found['images']:,} images of {found['groups']:,} groups: mean over "
                                    f"runs [95 % interval]. p: against {names[0]}, after Holm's correction. "
                                    + detectable_sentence(found)) + "}", r"\end{table}", "", escape(methods), ""]
    return "\n".join(lines)


def detectable_sentence(found):
    """What the test set could have shown at all: from the standard error of the differences, or of the one score."""
    parts = [f"{name} {scores[PRIMARY]['detectable']:.3f}" for name, scores in found["differences"].items()
             if scores[PRIMARY]["detectable"] is not None]
    if parts:
        return (f"Smallest difference in {PRIMARY} that a two-sided 5 % test finds with 80 % power: "
                + ", ".join(parts) + ".")
    (name, model), = list(found["models"].items())[:1]
    error = model["standard error"][PRIMARY]
    return f"Standard error of the {PRIMARY} of {name} over groups: {'-' if error is None else f'{error:.3f}'}."


STATISTICS = (f"Intervals are 95 % percentile intervals of a cluster bootstrap over test groups ({REPLICATES:,} replicates, "
              f"the same groups for all models). Differences were tested by two-sided sign-flip tests over groups (up to "
              f"{FLIPS:,} flips), with Holm's correction over the comparisons, for each score apart.")


# ---------------------------------------------------------------- files

def check_output(path, flag, script):
    """Fail before the work, not after it: `path` must be writable, and new or an earlier report of this script."""
    if not os.access(os.path.dirname(path) or ".", os.W_OK):
        raise ValueError(f"{flag} {path}: its folder does not exist or cannot be written to")
    if not os.path.exists(path):
        return
    own = False
    try:
        with open(path, encoding="utf-8") as file:
            own = json.load(file).get("written_by") == script if path.endswith(".json") else script in file.readline()
    except (OSError, ValueError, AttributeError):
        pass
    if not own:
        raise ValueError(f"{flag} {path}: exists and was not written by {script}; name another file")


def write_text(path, text):
    with open(f"{path}.tmp", "w", encoding="utf-8", errors="replace") as file:  # names need not be UTF-8
        file.write(text)
    os.replace(f"{path}.tmp", path)


def write_json(path, script, args, device, found):
    report = {"written_by": script, "args": vars(args), "device": str(device), **found,
              "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                           "pillow": PIL.__version__, "commit": git_commit()}}
    write_text(path, json.dumps(report, indent=1, allow_nan=False))
