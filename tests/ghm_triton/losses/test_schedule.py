"""Strength over the course of training."""

import math

import pytest
import torch

from ghm_triton import StrengthSchedule


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(0.4, 0.0), (0.0, 1.0)])
def test_it_moves_from_start_to_end_and_stays(shape, start, end):
    schedule = StrengthSchedule(start, end, steps=8, shape=shape)
    for step in (0, 1, 4, 7, 8, 9, 10**9):
        progress = min(step / 8, 1.0)
        if shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        value = schedule.at(torch.tensor(step))
        assert value.dtype == torch.float32
        # Computed in float64, rounded once.
        assert float(value) == pytest.approx(start + (end - start) * progress, rel=1e-7, abs=1e-16)


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        (r"start must lie in \[0, 1\], got 1.1", (1.1, 0.0, 10)),
        (r"end must lie in \[0, 1\], got -0.1", (0.5, -0.1, 10)),
        (r"end must lie in \[0, 1\], got nan", (0.5, math.nan, 10)),
        ("steps must be at least 1, got 0", (0.5, 0.0, 0)),
        ("shape must be one of linear, cosine; got 'step'", (0.5, 0.0, 10, "step")),
    ],
)
def test_bad_input(match, arguments):
    with pytest.raises(ValueError, match=match):
        StrengthSchedule(*arguments)
