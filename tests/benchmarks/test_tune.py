"""The search for a grid: its launches, and restoring the library's setting."""

import pytest
import torch

from benchmarks import tune
from ghm_triton.ops import launch


def test_a_pass_runs_with_the_programs_it_is_measured_with():
    before, seen = launch.PROGRAMS_EACH, []
    tune._with_programs(before + 3, lambda: seen.append(launch.PROGRAMS_EACH))
    assert seen == [before + 3]
    assert before == launch.PROGRAMS_EACH


def test_a_pass_that_fails_leaves_the_library_as_it_was():
    before = launch.PROGRAMS_EACH
    with pytest.raises(ZeroDivisionError):
        tune._with_programs(before + 3, lambda: 1 / 0)
    assert before == launch.PROGRAMS_EACH


def test_the_bytes_of_a_training_step_are_those_of_the_traffic_model():
    logits, labels = torch.empty(64, 80), torch.empty(64, dtype=torch.int64)
    moved = {name: size for name, size, _ in tune.passes(logits, labels)}
    assert moved == {"count": 64 * (80 * 4 + 8), "loss and gradient": 64 * (80 * 8 + 8)}
