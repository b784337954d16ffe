"""What all tests share: the interpreter where there is no GPU, poisoned fresh memory, seeds, the `--slow` flag."""
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
PARALLEL = "PYTEST_XDIST_WORKER" in os.environ  # make test: a worker for each of two cores
torch.set_num_threads(1 if PARALLEL else 2)
if PARALLEL:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start

# Triton looks at TRITON_INTERPRET when a kernel is defined: before the first import of kernels.
ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
import kernels  # noqa: E402

# files of a minute and more: they begin first, so that no worker waits for another one at the end
LONGEST = {"test_compile", "test_pretrain_script", "test_dry_run", "test_seg_learning", "test_step_cost"}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; runs only with --slow")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: pass --slow to run it"))


def pytest_report_header():
    return f"kernel tests run: {kernels.mode('cuda' if ON_GPU else 'cpu')}"


@pytest.fixture
def device():
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def ops(request, monkeypatch):
    """Kernel tests run the kernels, interpreted if need be. Other tests, and the scripts they start, run what a user
    of this machine runs."""
    if not ON_GPU and "test_kernel" not in request.module.__name__:
        kernels.use_reference(True)
        monkeypatch.delenv("TRITON_INTERPRET")
    yield
    kernels.use_reference(False)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Fresh floating-point memory holds NaN, so that whatever forgets to write a number shows it."""
    def poisoned(allocate):
        def empty(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() or x.is_complex() else x
        return empty
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
