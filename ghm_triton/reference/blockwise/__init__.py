"""The same arithmetic, a block of entries at a time: what trains on CPUs.

Plain tensor operations read and write all of their operands, some thirty of them an element here,
so that a whole batch passes through memory thirty times. These modules run the operations of
`ghm_triton.reference` over blocks that stay in the cache, in scratch memory of their own, and form
the gradient beside the loss. A block with an entry that is not sound (a logit that is not finite, a
target out of range) goes through the specification itself.

Memory, beside the gradient (one logit's bytes an entry): a few blocks of scratch.
"""

from ghm_triton.reference.blockwise.asl1 import count_asl1, weighted_asl1
from ghm_triton.reference.blockwise.bce import count_bce, weighted_bce
from ghm_triton.reference.blockwise.blocks import applies_to

__all__ = ["applies_to", "count_asl1", "count_bce", "weighted_asl1", "weighted_bce"]
