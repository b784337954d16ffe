"""Keep what benchmarks find, with machine, versions, commit and command: what commands print, or tables.

    python benchmarks/record.py benchmarks/results/demo.md "The demo" "make demo"
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from runtime import git_commit  # noqa: E402


def processor():
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def commit():
    """Commit of this code, and whether files differ from it; results do not count."""
    changed = subprocess.run(["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    return git_commit() + (" with changes" if changed.strip() else "")


def machine(known_commit=None):
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (f"{processor()}, {os.cpu_count()} cores, {device}; Python {platform.python_version()}, torch "
            f"{torch.__version__}; commit {known_commit or commit()}")


def record(path, title, commands, names=(), before=()):
    """Run each command (a list of words) from the project's folder and write `path`; names: (text, what to show for it);
    before: lines that come first."""
    text = [f"# {title}", "", f"{machine()}. Each block is a command, what it printed, and its time.", "", *before, ""]
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for words in commands:
        started = time.monotonic()
        done = subprocess.run(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True, env=environment)
        text += ["```", f"$ {shlex.join(words)}", *done.stdout.rstrip().splitlines(),
                 f"({(time.monotonic() - started) / 60:.1f} minutes)", "```", ""]
    text = "\n".join(text)
    for name, shown in names:
        text = text.replace(name, shown)
    Path(path).write_text(text)


# ---------------------------------------------------------------- tables

def cell(value):
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):  # three digits that count, but never 1e+03
        return f"{value:,.0f}" if 100 <= abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/").replace("\n", " ")


def table(rows):
    """Dicts, which need not have the same keys -> lines of a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[cell(row.get(key)) for key in columns] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *lines]]


def read_results(path):
    """What write_part has written to `path`.json: {part: {"title", "machine", "command", "minutes", "tables"}}."""
    file = Path(f"{path}.json")
    return json.loads(file.read_text()) if file.exists() else {}


def write_part(path, title, part, result):
    """Put one part's result into `path`.json, where other parts stay, and write `path`.md from all of them.

    result: title, machine, command, minutes, tables; a table is (caption, rows), rows a list of dicts.
    """
    parts = dict(sorted({**read_results(path), part: result}.items()))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.json").write_text(json.dumps(parts, indent=1) + "\n")
    text = [f"# {title}", ""]
    for name, found in parts.items():
        text += [f"## {name}: {found['title']}", "",
                 f"{found['machine']}. `{found['command']}`, {found['minutes']:.1f} minutes.", ""]
        for caption, rows in found["tables"]:
            text += [caption, "", *(table(rows) if rows else ["(nothing)"]), ""]
    Path(f"{path}.md").write_text("\n".join(text))


def reporter(path, title, part, subject, command):
    """report(caption, rows), which prints a table and writes it, with those before, as `part` of `path` at once. Minutes
    count from here; subject: the part's title, command: how to get it again."""
    tables, started = [], time.monotonic()

    def report(caption, rows):
        tables.append((caption, rows))
        print(caption, *rows, sep="\n  ", flush=True)
        write_part(path, title, part, dict(title=subject, machine=machine(), command=command,
                                           minutes=(time.monotonic() - started) / 60, tables=tables))

    return report


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    record(sys.argv[1], sys.argv[2], [shlex.split(line) for line in sys.argv[3:]])
