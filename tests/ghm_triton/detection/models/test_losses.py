import copy
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ghm_triton.detection.models.losses import (
    AuthenticSmoothL1,
    BackgroundFirst,
    Focal,
    GeneralizedIoU,
    IoU,
    SmoothL1,
)
from ghm_triton.losses import FocalLoss, GHMSoftmaxLoss

SCRIPT = Path(__file__).with_name("loss_ranks.py")
SPEC = importlib.util.spec_from_file_location("loss_ranks", SCRIPT)
loss_ranks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(loss_ranks)

ALL = [SmoothL1, AuthenticSmoothL1, IoU, GeneralizedIoU]
PRED = torch.tensor([[0.0, 0, 4, 4], [0, 0, 2, 2], [1, 1, 3, 3]], dtype=torch.float64)
TRUE = torch.tensor([[0.0, 0, 4, 2], [4, 0, 6, 2], [1, 1, 3, 3]], dtype=torch.float64)


def test_authentic_smooth_l1_is_the_papers():
    d = torch.tensor([[0.05, -0.05, 0.5, -2.0], [0.0, 0.01, 1.0, 3.0]], dtype=torch.float64)
    expected = [sum(math.sqrt(x * x + 0.02**2) - 0.02 for x in row) for row in d.tolist()]
    ours = AuthenticSmoothL1().rows(d + 1, torch.ones_like(d))
    assert ours.tolist() == pytest.approx(expected, rel=1e-12)  # float64, and d + 1 is rounded


def test_the_gradient_of_authentic_smooth_l1_is_the_papers():
    d = torch.tensor([[0.05, -0.02, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    AuthenticSmoothL1("sum")(d, torch.zeros_like(d)).backward()
    expected = [x / math.sqrt(x * x + 0.02**2) for x in d.detach()[0].tolist()]
    assert d.grad[0].tolist() == pytest.approx(expected, rel=1e-12)  # float64


def test_small_differences_keep_their_digits():
    d = torch.full((1, 4), 1e-6)
    expected = 4 * 1e-12 / (2 * 0.02)
    assert float(AuthenticSmoothL1()(d, torch.zeros(1, 4))) == pytest.approx(expected, rel=1e-5)


def test_iou_loss_is_one_minus_the_iou():
    # 8 of 16; none; the same box.
    assert IoU().rows(PRED, TRUE).tolist() == pytest.approx([0.5, 1.0, 0.0], abs=1e-12)
    assert float(IoU()(PRED, TRUE)) == pytest.approx(0.5, abs=1e-12)  # float64


def test_the_gradient_of_the_iou_loss_is_right():
    pred = torch.tensor([[0.3, 0.2, 4.1, 4.4], [2.5, 0.1, 5.0, 2.2]], dtype=torch.float64)
    loss = IoU()
    torch.autograd.gradcheck(lambda p: loss(p, TRUE[:2]), (pred.requires_grad_(),))


@pytest.mark.parametrize("kind", ALL)
def test_a_sum_is_the_mean_times_the_boxes_and_no_boxes_are_zero(kind):
    rows = kind().rows(PRED, TRUE)
    assert rows.shape == (3,)
    assert float(kind("sum")(PRED, TRUE)) == pytest.approx(float(rows.sum()), rel=1e-12)
    assert float(kind()(PRED, TRUE)) == pytest.approx(float(rows.sum()) / 3, rel=1e-12)
    empty = PRED[:0].clone().requires_grad_()
    kind()(empty, TRUE[:0]).backward()
    assert float(kind()(empty.detach(), TRUE[:0])) == 0.0


def test_an_unknown_reduction_is_named():
    with pytest.raises(ValueError, match="reduction must be mean or sum, got 'none'"):
        IoU("none")


def test_softmax_ghm_has_background_first():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3, -1, 3])  # 3 is background
    ours = BackgroundFirst(GHMSoftmaxLoss())(logits, labels)
    expected = GHMSoftmaxLoss()(logits, torch.tensor([1, 2, 3, 0, -1, 0]))
    assert float(ours) == float(expected)


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    """What either of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], env=environment, check=True, timeout=200
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(loss_ranks.SIZE)]


@pytest.mark.parametrize("share", loss_ranks.BOUNDS)
@pytest.mark.parametrize("case", [*loss_ranks.CASES, *loss_ranks.ALONE])
def test_ranks_are_one_process_with_the_whole_batch(by_rank, case, share):
    """Averaged over ranks, as gradients are, whatever share of the boxes each has."""
    whole = loss_ranks.found(case, None, slice(None))
    parts = [rank[case, share] for rank in by_rank]
    size = loss_ranks.SIZE
    # The harmonized losses are scaled in float32.
    near = {"rtol": 1e-6, "atol": 1e-12}
    torch.testing.assert_close(sum(p["loss"] for p in parts) / size, whole["loss"], **near)
    for name in whole.keys() - {"loss"}:
        slope = torch.cat([part[name] for part in parts]) / size
        torch.testing.assert_close(slope, whole[name], **near)


def test_focal_loss_of_one_process_is_the_packages():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3, -1, 4])  # 4 is background
    for reduction in ("mean", "sum"):
        expected = FocalLoss(reduction=reduction)(logits, labels)
        assert torch.equal(Focal(reduction)(logits, labels), expected)


@pytest.mark.parametrize("kind", [SmoothL1, Focal])
def test_a_copy_of_a_loss_shares_the_group(kind):
    group = object()
    assert copy.deepcopy(kind(process_group=group)).process_group is group
