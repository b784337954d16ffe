"""Run commands and keep what they print, with machine, versions and commit, as a Markdown result file.

    python benchmarks/record.py benchmarks/results/demo.md "The demo" "make demo"
"""

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


def record(path, title, commands, names=()):
    """Run each command (a list of words) from the project's folder and write `path`; names: (text, what to show for it)."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    text = [f"# {title}", "", f"{processor()}, {os.cpu_count()} cores, {device}; Python {platform.python_version()}, torch "
            f"{torch.__version__}; commit {git_commit()}. Each block is a command, what it printed, and its time.", ""]
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


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    record(sys.argv[1], sys.argv[2], [shlex.split(line) for line in sys.argv[3:]])
