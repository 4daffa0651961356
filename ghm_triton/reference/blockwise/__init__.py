"""The same arithmetic, a block of entries at a time: what trains on CPUs.

Plain tensor operations read and write all of their operands, some thirty of them an element here,
so that a whole batch passes through memory thirty times. These modules run the operations of
`ghm_triton.reference` over blocks that stay in the cache, in scratch memory of their own, and form
the gradient beside the loss. A block with an entry that is not sound (a logit that is not finite, a
target out of range) goes through the specification itself.

Beside the gradient (one logit's bytes an entry) a call holds the scratch memory, which is kept for
the next one: 12 bytes an entry of a block, 16 for boxes; that is 3 or 4 MiB, twice as much where
torch uses several threads.
"""

from ghm_triton.reference.blockwise.asl1 import count_asl1, weighted_asl1
from ghm_triton.reference.blockwise.bce import count_bce, weighted_bce
from ghm_triton.reference.blockwise.blocks import applies_to, hold_numbers
from ghm_triton.reference.blockwise.density import update_density

__all__ = [
    "applies_to",
    "count_asl1",
    "count_bce",
    "hold_numbers",
    "update_density",
    "weighted_asl1",
    "weighted_bce",
]
