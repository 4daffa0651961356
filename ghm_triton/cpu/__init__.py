"""The losses on CPUs: the arithmetic of `ghm_triton.reference`, one block of entries at a time.

Tensor operations over a whole batch stream every operand through memory, about thirty times per
entry here. This package runs them over blocks that stay in the cache, in working memory that is
kept between calls, and computes the gradient together with the loss.

Besides the gradient (the size of the logits) a call uses that working memory only: 12 bytes per
entry of a block, 16 for boxes and the focal loss, 32 for the focal loss with dense targets, and 4
more for dense targets that are not float32. A block has 262,144 entries, twice as many with several
threads.

Inputs that cannot be processed this way go to the specification: see `blocks.supports`.
"""

from ghm_triton.cpu.asl1 import count_asl1, weighted_asl1
from ghm_triton.cpu.classification import count_bce, weighted_bce, weighted_focal
from ghm_triton.cpu.density import update_density
from ghm_triton.cpu.softmax import count_softmax, weighted_softmax

__all__ = [
    "count_asl1",
    "count_bce",
    "count_softmax",
    "update_density",
    "weighted_asl1",
    "weighted_bce",
    "weighted_focal",
    "weighted_softmax",
]
