"""The memory-bound steps of pretraining: each a Triton kernel beside the plain-torch formula it equals."""
from .attention import attention
from .common import all_reduce, mode, takes_kernel, use_reference
from .cross_entropy import cross_entropy
from .prototype_loss import LogitChunks, prototype_loss
from .sinkhorn import sinkhorn
from .softmax_center import softmax_center, update_center
