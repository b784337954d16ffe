"""What a comparison of models says, and how: tables with intervals and paired tests, JSON, LaTeX, a methods text."""

import csv
import filecmp
import json
import os
import re
import sys

import numpy as np
import PIL
import torch

from frames.leakage import overlap
from frames.lists import groups_have_names
from runtime import git_commit, rename_aside
from scores.metrics import CLASSIFICATION_SCORES, confusion, per_class
from scores.stats import (detectable_difference, group_weights, holm, interval, replicate_scores, sign_flip_test,
                          standard_error)

REPLICATES, FLIPS = 2000, 10_000  # of the cluster bootstrap, of the sign-flip test
PRIMARY = "macro F1"  # what epochs and heads are chosen by
COLUMN, SIDE_BY_SIDE = 24, 4  # characters of a column; columns on a screen, beside the names
FEW_GROUPS = 30  # below: a warning


# ---------------------------------------------------------------- scores of all models on one test set

def compare(models, labels, groups, classes, seed, tests=True):
    """models {name: (scores (S, n, K), ranked)}, labels (n,), groups (n,), class names (K,) -> a dict of plain values,
    for `table`, `latex` and JSON.

    Intervals are percentiles of a cluster bootstrap with the same groups for all models. The first model is compared
    with each other one: difference, interval and, if asked for, p of a sign-flip test over groups, and p after Holm's
    correction over these comparisons, for each score apart. One group tells nothing of others: no interval, no p.
    """
    groups = np.unique(groups, return_inverse=True)[1]
    weights = group_weights(groups.max() + 1, seed, REPLICATES)
    replicates = {name: replicate_scores(labels, scores, groups, weights, ranked)
                  for name, (scores, ranked) in models.items()}
    found = {"images": len(labels), "groups": int(groups.max()) + 1, "classes": list(classes),
             "order": list(CLASSIFICATION_SCORES), "primary": PRIMARY, "models": {}}
    several = found["groups"] > 1
    for name, (scores, ranked) in models.items():
        runs = [replicate_scores(labels, run[None], groups, weights[:1], ranked) for run in scores]
        counts = confusion(labels, scores.argmax(2), len(classes))  # (S, K, K)
        pooled = per_class(counts.sum(0))
        found["models"][name] = {
            **scores_of(replicates[name], runs, several),
            "confusion, mean of runs": counts.mean(0).tolist(),
            "per class, pooled over runs": {label: {key: number(values[k]) for key, values in pooled.items()}
                                            for k, label in enumerate(classes)}}
    first, *others = models
    p = {}
    for name in others if tests and several else ():
        (a, ranked_a), (b, ranked_b) = models[first], models[name]
        p[name] = sign_flip_test(labels, a, b, groups, seed, FLIPS, ranked_a and ranked_b)
    return {**found, "differences": differences(replicates, p, several)}


def scores_of(replicates, runs, several):
    """What is said of a model's scores: replicates {score: (1 + R,)}, and such a dict of each run alone."""
    return {"runs": len(runs),
            "scores": {score: three(interval(values), several) for score, values in replicates.items()},
            "per run": {score: [number(run[score][0]) for run in runs] for score in replicates},
            "standard error": {score: number(standard_error(values)) if several else None
                               for score, values in replicates.items()}}


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
                **three(interval(difference), several), "p": number(value), "p (Holm)": number(adjusted),
                "detectable": number(detectable) if several and detectable > 1e-9 else None}
    return found


def number(value):
    """A float for JSON, which knows no nan."""
    return float(value) if np.isfinite(value) else None


def three(found, several):
    """(estimate, low, high) for JSON; of one group there are no bounds."""
    estimate, low, high = map(number, found)
    if estimate is None or not several:
        low = high = None
    return {"estimate": estimate, "low": low, "high": high}


# ---------------------------------------------------------------- what the models had seen of the test set

def find_copies(data):
    """Test images that lie in train or validation too, under another group: counts, their names, a sentence."""
    known, images = np.concatenate((data.train, data.val)), data.images
    seen = {"content": images.content[known], "looks": images.looks[known]}
    counts, _, copied = overlap(seen, images.content[data.test], images.looks[data.test])
    counts["names"] = [data.names[i] for i in data.test[copied]]
    if not copied.any():
        return {**counts, "sentence": "No test image was a copy or a look-alike of one in train or validation."}
    return {**counts, "sentence": f"{count(int(copied.sum()), 'test image')} ({counts['identical']:,} by "
            f"pixels, the others by look) also lay in train or validation, in another group."}


def files_of(infos, data):
    """{name of a model: what each of its files is, how it was fed, and whether it was pretrained on test images}."""
    named = groups_have_names(data.grouped_by)
    files = {}
    for name, own in infos.items():
        files[name] = []
        for info in own:
            counts = line = None
            if info["digest"] is not None:
                counts, line, _ = overlap(info["seen"], data.images.content[data.test], data.images.looks[data.test],
                                          data.groups[data.test].tolist() if named else None)
            files[name].append({"path": info["path"], "family": info["family"], "sha256": info["digest"],
                                "mean": info["mean"], "std": info["std"], "img_size": info["fed"],
                                "config": info["config"], "in pretraining set": counts, "pretraining set": line})
    return files


# ---------------------------------------------------------------- as text

def shorten(name, width):
    return name if len(name) <= width else name[:width // 2 - 1] + "…" + name[-(width - width // 2):]


def decimals(score):
    return 2 if score.endswith("]") else 3  # a score with a unit is a length, others go from 0 to 1


def as_text(value, score):
    return "-" if value is None else f"{value:.{decimals(score)}f}"


def cell(found, score, signed=False):
    form = f"{'+' if signed else ''}.{decimals(score)}f"
    if found["low"] is None:
        return "-" if found["estimate"] is None else f"{found['estimate']:{form}} [-]"
    return f"{found['estimate']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


def row(title, cells):
    return f"{shorten(title, COLUMN - 1):{COLUMN}}" + "".join(f"{text:{COLUMN - 1}} " for text in cells).rstrip()


def table(found):
    """Lines: a row per model, then the first model minus each other one, with p before and after Holm's correction.

    Of more scores than a screen is wide, there are several such blocks.
    """
    order, lines = found["order"], []
    for shown in np.array_split(order, -(-len(order) // SIDE_BY_SIDE)):
        lines += [""] * bool(lines) + block(found, shown.tolist())
    return lines


def block(found, shown):
    lines = [row("", shown)]
    for name, model in found["models"].items():
        lines.append(row(name, [cell(model["scores"][score], score) for score in shown]))
        if model["runs"] > 1:
            lines.append(row(f"  sd of {model['runs']} runs", [spread(model, score) or "-" for score in shown]))
    if found["differences"]:
        lines.append(f"{shorten(next(iter(found['models'])), 100)} minus ...")
    for name, scores in found["differences"].items():
        lines.append(row(f"  {name}", [cell(scores[score], score, signed=True) for score in shown]))
        lines.append(row("    p, and after Holm", [p_text(scores[score]) for score in shown]))
    return lines


def spread(model, score):
    """Standard deviation over runs as text, or None."""
    values = model["per run"][score]
    return None if None in values or len(values) < 2 else f"{np.std(values, ddof=1):.{decimals(score)}f}"


def p_text(found):
    return "-" if found["p"] is None else f"{p_value(found['p'])}, {p_value(found['p (Holm)'])}"


def p_value(p):
    return f"{p:.4f}" if p >= 0.0001 else "<0.0001"


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


def by_column(models, labels, groups, classes, values, seed):
    """{value of the column: what `compare` finds on its images alone}, without tests."""
    found = {}
    for value in sorted(set(values)):
        own = np.array([other == value for other in values])
        found[value] = compare({name: (scores[:, own], ranked) for name, (scores, ranked) in models.items()},
                               labels[own], groups[own], classes, seed, tests=False)
    return found


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


def count(number, noun):
    return f"{number:,} {noun}{'s' * (number != 1)}"


def runs_text(found):
    return ", ".join(f"{name}: {count(model['runs'], 'run')}" for name, model in found["models"].items())


# ---------------------------------------------------------------- as LaTeX

def escape(text):
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
               ">": r"\textgreater{}", "…": r"\ldots{}", "[": "{[}",  # after \\ it would begin an argument
               **{letter: "\\" + letter for letter in "&%$#_{}"}}
    return re.sub("-(?=-)", "-{}", "".join(special.get(letter, letter) for letter in text))  # no dash of two hyphens


def latex(found, methods, script, warning=""):
    """The table, the size of the test set, the smallest detectable difference and the methods text, for any document
    class and no further package. warning: what the caption must begin with."""
    def lines_of(value, score, spread=None):
        if value["estimate"] is None:
            return "--"
        form = f".{decimals(score)}f"
        above = f"{value['estimate']:{form}}" + (rf" $\pm$ {spread}" if spread else "")
        return above if value["low"] is None else (r"\shortstack{" + above + r"\\{[}" + f"{value['low']:{form}}, "
                                                   f"{value['high']:{form}}" + "{]}}")

    first, order = next(iter(found["models"])), found["order"]
    size = r"\footnotesize" if len(order) <= SIDE_BY_SIDE else r"\scriptsize\setlength{\tabcolsep}{3pt}"
    lines = [f"% written by {script}", r"\begin{table}", r"\centering" + size,
             r"\begin{tabular}{l" + "c" * len(order) + "}", r"\hline",
             " & ".join(["", *map(escape, order)]) + r" \\", r"\hline"]
    for name, model in found["models"].items():
        cells = [lines_of(model["scores"][score], score, spread(model, score)) for score in order]
        lines.append(" & ".join([escape(name), *cells]) + r" \\")
    for name, scores in found["differences"].items():
        cells = [lines_of(scores[score], score) for score in order]
        tests = ["--" if scores[score]["p"] is None else escape(p_value(scores[score]["p (Holm)"])) for score in order]
        lines += [r"\hline", " & ".join([escape(f"{first} minus {name}"), *cells]) + r" \\",
                  " & ".join([r"\quad p after Holm", *tests]) + r" \\"]
    caption = (f"{warning}Test set of {count(found['images'], 'image')} of {count(found['groups'], 'group')}: mean "
               f"over runs +- standard deviation over runs [95 % interval over groups]. {few_groups(found)}"
               f"{detectable_sentence(found)}")
    lines += [r"\hline", r"\end{tabular}", r"\caption{" + escape(caption).replace("+-", r"$\pm$") + "}", r"\end{table}",
              "", escape(methods), ""]
    return "\n".join(lines)


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


STATISTICS = (f"Intervals are 95 % percentile intervals of a cluster bootstrap over test groups ({REPLICATES:,} "
              f"replicates, the same groups for all models). Differences were tested by two-sided sign-flip tests over "
              f"groups (up to {FLIPS:,} flips), with Holm's correction over the comparisons, for each score apart.")


def counts_line(data):
    return ", ".join(f"{part} {len(own):,} images of {len(np.unique(data.groups[own])):,} groups"
                     for part, own in (("train", data.train), ("validation", data.val), ("test", data.test)))


# ---------------------------------------------------------------- files

def write_split(path, columns, data):
    """CSV of these columns, {name: values (n,)}, and the part of each image, for whoever wants to train another model
    on the same parts. Another split that is there is kept under another name."""
    parts = {i: part for part in ("train", "val", "test") for i in getattr(data, part)}
    with open(f"{path}.tmp", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "split"])
        writer.writerows([*values, parts[i]] for i, values in enumerate(zip(*columns.values())))
    if os.path.exists(path) and not filecmp.cmp(f"{path}.tmp", path, shallow=False):
        print(f"{path} is another split: kept as {rename_aside(path)}")
    os.replace(f"{path}.tmp", path)


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


def slug(name):
    return re.sub(r"[^\w.-]+", "_", name)


def write_predictions(folder, name, runs, data):
    """A CSV per run, as --predictions takes it: class probabilities of the test images."""
    for number, scores in enumerate(runs):
        path = os.path.join(folder, f"predictions-{slug(name)}-{number}.csv")
        with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["image", *data.classes])
            writer.writerows([data.names[i], *(f"{value:.6g}" for value in row)] for i, row in zip(data.test, scores))


def write_json(path, script, args, device, found):
    """Over the report of an earlier run with the same arguments; one with others is kept aside."""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            if json.load(file).get("args") != json.loads(json.dumps(vars(args))):
                print(f"{path} is of other arguments: kept as {rename_aside(path)}")
    report = {"written_by": script, "args": vars(args), "device": str(device), **found,
              "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                           "pillow": PIL.__version__, "commit": git_commit()}}
    write_text(path, json.dumps(report, indent=1, allow_nan=False))
