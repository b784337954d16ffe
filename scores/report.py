"""How a comparison is printed: tables as text and LaTeX, methods, what models had seen, the files of a report."""

import csv
import filecmp
import json
import os
import re
import shlex
import sys

import numpy as np
import PIL
import torch

from frames.files import whole_file
from frames.leakage import overlap
from frames.lists import groups_have_names
from runtime import git_commit, rename_aside
from scores.comparison import STATISTICS, detectable_sentence, few_groups

COLUMN, SIDE_BY_SIDE = 24, 4  # characters of a column; columns on a screen, beside the names
PHANTOMS = "phantom images: a smoke test of the code, no evidence about ultrasound."


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


def latex(found, script):
    """The table, the size of the test set, the smallest detectable difference and the methods text in `found`, for any
    document class and no further package."""
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
    warning = f"{PHANTOMS} " if found["phantom"] else ""
    caption = (f"{warning}Test set of {count(found['images'], 'image')} of {count(found['groups'], 'group')}: mean "
               f"over runs +- standard deviation over runs [95 % interval over groups]. {few_groups(found)}"
               f"{detectable_sentence(found)}")
    lines += [r"\hline", r"\end{tabular}", r"\caption{" + escape(caption).replace("+-", r"$\pm$") + "}", r"\end{table}",
              "", escape(found["methods"]), ""]
    return "\n".join(lines)


# ---------------------------------------------------------------- a whole report

def report_lines(found, files_times, tables):
    """What a stage says at its end, of a description with "files", "copies", "chosen" and "phantom"."""
    yield ""
    for name, files in found["files"].items():
        for file in files:
            if file["pretraining set"]:
                yield f"{name}, {file['path']}: {file['pretraining set']}"
    yield found["copies"]["sentence"]
    for name, runs in found["chosen"].items():
        texts = (", ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
                           for key, value in run.items()) for run in runs)
        yield f"{name}, on validation: {'; '.join(texts)}"
    yield (f"\ntest: {count(found['images'], 'image')} of {count(found['groups'], 'group')}; mean over runs "
           f"({runs_text(found)}; files times {files_times}) [95 % interval over groups]\n")
    yield from (*table(found), "", *tables, "", few_groups(found) + detectable_sentence(found))
    if found["phantom"]:
        yield f"\n{PHANTOMS}"


def methods_text(found, data, script, images, given, protocol, scores=""):
    """What a paper must say, with the counts and arguments of this run. images, scores: sentences on what is theirs;
    given: how other people's models came in, each in words."""
    seen = [f"{name}: {file['pretraining set']}. " for name, files in found["files"].items() for file in files
            if file["pretraining set"]]
    return "".join([
        f"{PHANTOMS} " if found["phantom"] else "",
        f"{count(len(found['models']), 'model')} were compared on {len(data.names):,} images of "
        f"{len(np.unique(data.groups)):,} groups (by {data.grouped_by}): {counts_line(data)}; no group was in two "
        f"parts. {images}",
        f"Given were {', '.join(given)}. " if given else "",
        f"All models{' but these' if given else ''} had the same protocol and budget: {protocol}; "
        f"{runs_text(found)}. {scores}{STATISTICS} {few_groups(found)}{detectable_sentence(found)} ", *seen,
        f"Command: {shlex.join(['python', script, *sys.argv[1:]])}."])


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
    with whole_file(path, "w", encoding="utf-8", errors="replace") as file:  # names need not be UTF-8
        file.write(text)


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
