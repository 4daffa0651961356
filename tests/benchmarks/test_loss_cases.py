"""The problems: completeness, order, and minimum traffic."""

import pytest
import torch

from benchmarks.loss_cases import CLASSES, QUICK, TASKS, Case


def case(task="classification", entries=QUICK, dtype="float32", target="index", device="cpu"):
    return Case(task, entries, dtype, target, device)


@pytest.mark.parametrize(("task", "target"), TASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors(task, target, dtype):
    problem = case(task, 20_001, str(dtype).removeprefix("torch."), target)
    pred, given = problem.tensors(seed=1)
    assert pred.shape == problem.shape
    assert 20_001 <= pred.numel() < 20_001 + pred.shape[1]  # whole rows
    assert pred.nbytes == problem.logits_bytes
    assert pred.dtype == dtype
    assert pred.is_leaf
    assert pred.requires_grad
    assert not given.requires_grad
    if target == "index":
        assert given.shape == pred.shape[:1]
        assert given.dtype == torch.int64
        assert given.min() >= 0
        assert given.max() <= CLASSES
    else:
        assert (given.shape, given.dtype) == (pred.shape, dtype)
    again, other = problem.tensors(seed=1)[0], problem.tensors(seed=2)[0]
    assert torch.equal(pred, again)
    assert not torch.equal(pred, other)


def test_bytes_that_must_move():
    """Logits twice, the gradient once, dense targets twice; per entry, by hand."""
    for loss in ("ghm_c triton", "ghm_c torch"):
        assert case().traffic(loss) == 12
        assert case(dtype="bfloat16").traffic(loss) == 6
        assert case(target="dense").traffic(loss) == 20
        assert case(target="dense", dtype="bfloat16").traffic(loss) == 10
    assert case("regression", target="dense").traffic("ghm_r triton") == 20
    assert case("softmax").traffic("ghm_softmax triton") == 12
    assert case().traffic("focal triton") == 8
    assert case(target="dense").traffic("focal triton") == 12
    for peer in ("bce", "bce one-hot compiled", "ghm_c released", "ghm_c triton compiled"):
        assert case().traffic(peer) is None
