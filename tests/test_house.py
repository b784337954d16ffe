"""The plan of the project: which room stands on which floor, that no import runs upwards or in a circle."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("pretrain", "finetune_cls", "finetune_seg", "finetune_multi", "fewshot", "predict")
# from the ground up; a room, a folder or a file, imports from floors below its own, and from rooms of its own floor
# where no circle comes of it
FLOORS = (("arguments", "kernels", "frames", "runtime"), ("model", "data"), ("losses", "labelled"),
          ("networks", "scores"), ("training", "pack"), STAGES, ("tools",), ("benchmarks",))
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MOST_LINES, DOORS = 500, 12  # of a file; Python files in the top folder


def sources():
    """{module's dotted name: its path} of all but tests and hidden folders, such as .venv."""
    paths = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): ROOT / path for path in paths
            if path.parts[0] != "tests" and not any(part.startswith(".") for part in path.parts)}


def imported(path, name, modules):
    """The project's modules that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            module = ".".join(filter(None, (package if node.level else "", node.module)))
            for alias in node.names:  # a module of a package, or something in one
                names.append(f"{module}.{alias.name}" if f"{module}.{alias.name}" in modules else module)
        found |= {own for own in names if own in modules} - {name}
    return found


MODULES = sources()
IMPORTS = {name: imported(path, name, MODULES) for name, path in MODULES.items()}


def room(module):
    return module.partition(".")[0]


def test_every_source_file_is_in_a_room():
    assert {room(name) for name in MODULES} == set(FLOOR)
    assert all(name.count(".") < 2 for name in MODULES), "a room has no rooms in it"
    assert sum(map(len, IMPORTS.values())) > 150  # they are really found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_import_runs_upwards(name):
    """Nor between the stages, which share what stands below them; tools may look at all."""
    for other in sorted(IMPORTS[name]):
        assert FLOOR[room(other)] <= FLOOR[room(name)], f"{name} imports {other}, which is above it"
        assert room(name) not in STAGES or room(other) not in STAGES, f"{name} imports {other}, another stage"


def circle(imports):
    """The modules of one circle of imports, or []."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name):]
        if name not in done:
            path.append(name)
            for other in sorted(imports[name]):
                if found := visit(other):
                    return found
            path.pop()
            done.add(name)
        return []

    return next(filter(None, map(visit, sorted(imports))), [])


def test_no_circle_of_files_or_rooms():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"] and circle({"a": {"b"}, "b": set()}) == []
    assert circle(IMPORTS) == []
    rooms = {own: {room(other) for name in IMPORTS if room(name) == own for other in IMPORTS[name]} - {own}
             for own in FLOOR}
    assert circle(rooms) == []


def test_sizes():
    """So few files in the top folder that a reader sees the plan, none too long to be read in one go."""
    assert len(list(ROOT.glob("*.py"))) <= DOORS
    tests = {str(path.relative_to(ROOT)): path for path in (ROOT / "tests").rglob("*.py")}
    long = {name: lines for name, path in {**MODULES, **tests}.items()
            if (lines := len(path.read_text().splitlines())) > MOST_LINES}
    assert not long


def test_packing_needs_no_torch():
    """torch would cost each of its processes seconds and 150 MB."""
    done = subprocess.run([sys.executable, "-c", "import sys, pack; assert 'torch' not in sys.modules, 'torch'"],
                          cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert not done.returncode, done.stderr
