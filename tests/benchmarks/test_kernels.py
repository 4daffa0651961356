"""Recorded launches, and how they are specialised for the compiler."""

import pytest
import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from benchmarks.kernels import Launch, Variant, first_launch, specialise


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


@JITFunction  # compiled even where this process interprets
def kernel(x_ptr, none_ptr, row, col, factor, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # noqa: N803
    """Not compiled here."""


@JITFunction
def other_kernel(x_ptr):
    """Not compiled here."""


def launcher(x, col=1):
    kernel[(7,)](x, None, 80, col, factor=1.0, BLOCK_C=4, BLOCK_R=32, num_warps=8)
    other_kernel[(1,)](x)


def test_the_first_launch_is_written_down():
    x = empty(3)
    launch = first_launch(launcher, x)
    assert launch.kernel is kernel
    assert launch.arguments.pop("x_ptr") is x
    assert launch.arguments == {
        "none_ptr": None,
        "row": 80,
        "col": 1,
        "factor": 1.0,
        "BLOCK_R": 32,
        "BLOCK_C": 4,
    }
    assert launch.options == {"num_warps": 8}


def entries(moved=4.0, **arguments):
    return Variant(Launch(kernel, arguments, {}), "", "fp32", moved).entries


def test_the_elements_of_a_tile():
    assert entries(BLOCK_R=128, BLOCK_C=16, cols=80) == 128 * 16
    assert entries(BLOCK=2048, BLOCK_BINS=32) == 2048
    assert entries(moved=0.0, BLOCK=1024) == 0.0


def test_what_hangs_over_is_no_element():
    # Two tiles of 16 columns hold 20 classes: 10 each on average.
    assert entries(BLOCK_R=128, BLOCK_C=16, cols=20) == 128 * 10


def told(value, plain=False):
    """Type, constant and attribute of one argument as passed to the compiler."""

    @JITFunction
    def one(argument):
        """A kernel of one argument."""

    one.params[0].do_not_specialize = plain
    found = specialise(Launch(one, {"argument": value}, {}))
    constants, attributes = found.constants.get("argument", "not compiled in"), found.attributes
    return found.types["argument"], constants, bool(attributes)


@pytest.mark.parametrize(
    ("value", "kind", "aligned"),
    [
        (empty(1), "*fp32", True),
        (empty(1, dtype=torch.bfloat16), "*bf16", True),
        (empty(1, dtype=torch.float16), "*fp16", True),
        (empty(1, dtype=torch.float64), "*fp64", True),
        (empty(1, dtype=torch.int64), "*i64", True),
        (80, "i32", True),
        (0, "i32", True),
        (4, "i32", False),  # a row of box deltas promises nothing
        (2**31 - 1, "i32", False),
        (2**31, "i64", True),
        (1.0, "fp32", False),
    ],
)
def test_arguments_are_told_as_a_launch_tells_them(value, kind, aligned):
    assert told(value) == (kind, "not compiled in", aligned)
