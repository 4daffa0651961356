"""What a launch tells the compiler must not break the code that reads tiles. Needs no GPU."""

import os

import pytest
import torch

from benchmarks.kernels import TARGETS, build, first_launch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="the interpreter compiles nothing; run without TRITON_INTERPRET",
)


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("name", ["count_bce", "bce", "focal", "count_softmax", "softmax"])
def test_one_class_compiles(name):
    """A launch compiles an argument of 1 in: then `cols` is a number and no tensor."""
    from ghm_triton.ops import bce, focal, softmax

    data = (empty(4096, 1), empty(4096, dtype=torch.int64), None)
    weights, scale, flags = empty(30), empty(), (False, True, True)
    launcher, rest = {
        "count_bce": (bce.launch_count, (30,)),
        "bce": (bce.WEIGHTED_BCE.forward, (weights, scale, *flags)),
        "focal": (focal.FOCAL.forward, (scale, 0.25, 2.0, *flags)),
        "count_softmax": (softmax.launch_count, (30,)),
        "softmax": (softmax.WEIGHTED_SOFTMAX.forward, (weights, scale, *flags)),
    }[name]
    launch = first_launch(launcher, *data, *rest)
    assert launch.arguments["cols"] == 1
    assert build(launch, TARGETS["sm_90"]).asm["cubin"]
