"""Every mask, guard and scale of every kernel is needed: without it a test of its file fails.

Each kernel file is changed in one place at a time, inside its `@triton.jit` functions: a mask, a mask's value for
absent elements, one side of an `&`, a `tl.where`, a factor, a subtracted term or a 64-bit cast goes away. A process
that has loaded torch once forks per mutant, imports the changed package and runs that file's tests until one fails
(a segmentation fault is a failure: operands end where mapped memory ends). Interpreter only.
"""
import ast
import copy
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
# Which tests run for a file's mutants: the test file, and how their names start.
FILES = {"attention": ("test_kernel_attention.py", "test_attention"),
         "softmax_center": ("test_kernels.py", "test_softmax_center"),
         "sinkhorn": ("test_kernels.py", "test_sinkhorn"),
         "cross_entropy": ("test_kernels.py", "test_cross_entropy")}


def replacements(node):
    """The nodes that may stand in for this one, each with something missing."""
    call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    if call in ("tl.load", "tl.store"):
        keywords = {keyword.arg: keyword for keyword in node.keywords}
        if "mask" in keywords:
            yield ast.Call(node.func, node.args, [])
        if "other" in keywords:
            poison = ast.parse('float("nan")', mode="eval").body
            yield ast.Call(node.func, node.args, [keywords["mask"], ast.keyword("other", poison)])
            if ast.unparse(keywords["other"].value) != "0.0":
                yield ast.Call(node.func, node.args, [keywords["mask"], ast.keyword("other", ast.Constant(0.0))])
    if call == "tl.where":
        yield from node.args[1:]
    if call.endswith(".to") and ast.unparse(node.args[0]) == "tl.int64":
        yield node.func.value
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, (ast.Mult, ast.BitAnd, ast.Div, ast.Sub, ast.Mod, ast.FloorDiv)):
            yield node.left
        if isinstance(node.op, (ast.Mult, ast.BitAnd)):
            yield node.right


def mutants(source):
    """(description, changed source) for every replacement inside a kernel."""
    tree = ast.parse(source)
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and "triton.jit" in map(ast.unparse, function.decorator_list):
            addresses = {id(x) for call in ast.walk(function) if isinstance(call, ast.Call)
                         if ast.unparse(call.func) in ("tl.load", "tl.store") for x in ast.walk(call.args[0])}
            for i, node in enumerate(ast.walk(function)):
                if id(node) in addresses and isinstance(node, ast.BinOp):
                    continue  # where to read is no mask or scale
                for j, _ in enumerate(replacements(node)):
                    changed = copy.deepcopy(tree)
                    twin = changed.body[tree.body.index(function)]
                    target = list(ast.walk(twin))[i]
                    put = list(replacements(target))[j]
                    before = ast.unparse(target)

                    class Swap(ast.NodeTransformer):
                        def visit(self, x):
                            return put if x is target else self.generic_visit(x)
                    Swap().visit(twin)
                    yield f"{function.name}:{node.lineno}: {before}  ->  {ast.unparse(put)}", ast.unparse(changed)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_mutant_fails(name, tmp_path):
    pytest.importorskip("triton")
    changes = [("no change", (KERNELS / f"{name}.py").read_text())]
    changes += mutants(changes[0][1])
    for i, (_, source) in enumerate(changes):
        shutil.copytree(KERNELS, tmp_path / str(i) / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        (tmp_path / str(i) / "kernels" / f"{name}.py").write_text(source)
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, __file__, str(tmp_path), str(len(changes)), *FILES[name]]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    verdicts = run.stdout.split()
    assert len(verdicts) == len(changes), run.stdout + run.stderr
    assert verdicts[0] == "passed", "the unchanged kernel fails its own tests"
    survivors = [what for (what, _), verdict in zip(changes[1:], verdicts[1:]) if verdict == "passed"]
    print(f"{name}: {len(changes) - 1} mutants, {len(survivors)} survived")
    assert not survivors, "\n".join(survivors)


def try_mutant(folder, test_file, tests):
    """Exit status 0 when the tests pass on the package in this folder; output goes nowhere."""
    signal.alarm(300)
    sys.path.insert(0, folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    import kernels
    assert kernels.__file__.startswith(folder)
    arguments = ["-x", "-q", "-k", tests + " and not reference", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    os._exit(pytest.main([str(Path(__file__).parent / test_file), *arguments]) != 0)


if __name__ == "__main__":
    import torch  # noqa: F401  loaded once, shared by all forks
    import triton  # noqa: F401
    top, count, test_file, tests = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
    sys.path.insert(0, str(KERNELS.parent / "tests"))
    jobs = min(2, os.cpu_count())
    for i in range(0, count, jobs):
        pids = []
        for j in range(i, min(i + jobs, count)):
            pids.append(os.fork())
            if pids[-1] == 0:
                try_mutant(os.path.join(top, str(j)), test_file, tests)
        for pid in pids:
            print("passed" if os.waitpid(pid, 0)[1] == 0 else "failed", flush=True)
