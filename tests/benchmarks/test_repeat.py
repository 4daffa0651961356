"""Repeated runs: a difference of one bit is found."""

import pytest
import torch

from benchmarks import repeat
from benchmarks.result_file import Rows, read

ORIGIN = {"device": "cpu", "gpu": None, "cpu": "this", "source": "abc"}


def steady(pred, target):
    return (pred * pred).sum()


def flickering(at, change):
    """Make a loss that changes at one call."""
    calls = 0

    def trial(pred, target):
        nonlocal calls
        calls += 1
        return change(pred) if calls == at else steady(pred, target)

    return trial


@pytest.fixture
def given():
    return torch.arange(1.0, 5.0, requires_grad=True), torch.zeros(4)


@pytest.mark.parametrize(
    "change",
    [
        lambda pred: (pred * pred).sum() * (1 + 2**-23),  # loss and gradient, one bit
        lambda pred: (pred * pred).sum() + (pred - pred.detach())[2] * 2**-20,  # gradient only
        lambda pred: (pred * pred).sum() + 2**-18,  # loss only
        lambda pred: (pred * pred).sum() * torch.nan,
    ],
)
@pytest.mark.parametrize("at", [1, 2, 11])
def test_one_bit_is_found(given, change, at):
    # Against the first run: where that is the odd one, all others differ.
    assert repeat.differing(flickering(at, change), *given, 10) == (10 if at == 1 else 1)


def test_bits():
    zeros, nans = torch.tensor([0.0, -0.0]), torch.full((2,), torch.nan)
    assert repeat.bits(zeros)[0] != repeat.bits(zeros)[1]
    assert repeat.bits(nans)[0] == repeat.bits(nans)[1]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert len(repeat.bits(torch.ones(3, dtype=dtype))) == 3


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kind, _ in repeat.trials("torch")]
)
def test_every_loss_takes_its_inputs(name, kind):
    (trial,) = [each for of, on, each in repeat.trials("torch") if (of, on) == (name, kind)]
    for dtype in repeat.DTYPES:
        pred, target = repeat.inputs((129, 17), dtype, kind, "cpu")
        assert pred.dtype == repeat.DTYPES[dtype]
        again, _ = repeat.inputs((129, 17), dtype, kind, "cpu")
        assert torch.equal(pred, again)
        assert repeat.differing(trial, pred, target, 2) == 0
    if kind == "index":  # ignored and background rows as well
        assert {-1, 17} <= set(target.tolist())


def test_rows_name_what_differed_or_failed_and_only_those_are_repeated(tmp_path, monkeypatch):
    def broken(pred, target):
        raise RuntimeError("no such kernel")

    losses = {"steady": steady, "flickers": flickering(3, torch.sum), "broken": broken}
    trials = [(name, "boxes", loss) for name, loss in losses.items()]
    monkeypatch.setattr(repeat, "trials", lambda _: trials)
    path = tmp_path / "repeat.jsonl"
    assert not repeat.run("cpu", 5, [(3, 4)], Rows(path, ORIGIN), limit=100)
    rows = {row["loss"]: row for row in read(path) if row["dtype"] == "float32"}
    assert (rows["steady"]["differing"], rows["steady"]["times"]) == (0, 5)
    assert rows["flickers"]["differing"] == 1
    assert rows["broken"]["error"] == "RuntimeError: no such kernel"
    count = len(read(path))
    repeat.run("cpu", 5, [(3, 4)], Rows(path, ORIGIN), limit=100)
    assert {row["loss"] for row in read(path)[count:]} == {"flickers", "broken"}
