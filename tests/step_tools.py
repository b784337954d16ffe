"""A small pretraining step, and its cost by tensors without numbers."""
import pytest

import kernels
import pretrain
from tools import dry_run

SMALL = ["--preset", "cpu", "--head_n_prototypes", "32", "--head_hidden_dim", "16", "--head_bottleneck_dim", "8",
         "--global_crops_size", "16", "--local_crops_size", "8", "--patch_size", "4", "--canvas", "24",
         "--batch_size_per_gpu", "4", "--drop_path_rate", "0.3"]


def fake_step(args, change=lambda student: None, reference=False):
    """Peak memory and work of a step; raises where the host would wait for a number from the device."""
    build = pretrain.build_networks

    def changed(*arguments):
        networks = build(*arguments)
        change(networks[0])
        return networks
    kernels.use_reference(reference)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "build_networks", changed)
        return dry_run.predicted_cost(args)
