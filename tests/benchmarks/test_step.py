"""A training step with each loss: values of the losses, and that each trains."""

import pytest
import torch
from torch import nn

from benchmarks import step
from benchmarks.peers import ReleasedGHMC

ORIGIN = {"device": "cpu", "gpu": None, "cpu": "this", "source": "abc"}


@pytest.fixture(scope="module")
def bench():
    return step.Bench("cpu", 2, (64, 96))


@pytest.fixture
def batch():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 30, 5), torch.randint(-1, 6, (2, 30))
    labels[0, :4] = torch.tensor([0, 4, 5, -1])
    return logits, labels, labels >= 0


def test_plain_bce_leaves_out_the_ignored_and_divides_by_the_positives(batch):
    logits, labels, valid = batch
    target = torch.zeros(60, 6).scatter_(1, labels.clamp(min=0).view(-1, 1), 1).view(2, 30, 6)
    entries = nn.BCEWithLogitsLoss(reduction="none")(logits, target[..., :5])
    count = int((valid & (labels < 5)).sum())
    loss = step.PlainBCE()(logits, labels)
    assert loss.item() == pytest.approx(float(entries[valid].sum() / count), rel=1e-6)
    logits[~valid] = 50.0
    assert torch.equal(step.PlainBCE()(logits, labels), loss)
    nothing = step.PlainBCE()(logits, torch.full_like(labels, 5))  # divided by 1, not by 0
    assert nothing.isfinite()


def test_the_released_loss_sees_the_whole_batch_without_the_ignored(batch):
    logits, labels, valid = batch
    expected = ReleasedGHMC()(logits[valid], labels[valid]).item()
    assert step.Released()(logits, labels).item() == pytest.approx(expected, rel=1e-5)
    pred, target = torch.randn(7, 4), torch.randn(7, 4)
    ten = step.ReleasedRegression()(pred, target).item()
    assert ten == pytest.approx(10 * step.ReleasedGHMR()(pred, target).item(), rel=1e-6)


def test_every_loss_trains_and_has_a_row(bench):
    """`bce`, ours and the released loss; the others are similar."""
    from ghm_triton import GHMCLoss, GHMRLoss

    field = dict(step.losses(None))
    assert list(field) == ["bce", "ghm", "ghm released", "focal", "focal torchvision"]
    classification, regression = field["ghm"].classification, field["ghm"].regression
    assert [type(each.loss) for each in (classification, regression)] == [GHMCLoss, GHMRLoss]
    field = {name: field[name] for name in ("bce", "ghm", "ghm released")}
    before = bench.model.head.classification_head.cls_logits.bias.detach().clone()
    rows = {row["loss"]: row for row in step.measure(bench, field, 0.001, rounds=1)}
    assert list(rows) == list(field)
    for row in rows.values():
        assert (row["batch"], row["image_size"]) == (2, [64, 96])
        assert row["value"] > 0
        assert row["ratios"] == {"bce": pytest.approx(row["median_ms"] / rows["bce"]["median_ms"])}
    moved = bench.model.head.classification_head.cls_logits.bias.detach() - before
    assert 0 < moved.abs().max() < 1e-3  # it trains, and so little that all meet one network
    assert classification.loss.density.updates > 0


def test_a_loss_that_fails_or_is_not_finite_has_a_row_that_says_so():
    class Pretend:
        device = "cpu"
        images = (torch.zeros(3, 8, 9),)
        last = torch.zeros(())
        calls = 0

        def step(self, chosen):
            self.calls += chosen == "late"
            if chosen == "broken" or (chosen == "late" and self.calls == 3):
                raise RuntimeError(f"{chosen} fails")
            self.last = torch.tensor(torch.nan if chosen == "nan" else 1.0)

    field = {name: name for name in ("bce", "broken", "nan", "late", "good")}
    rows = {row["loss"]: row for row in step.measure(Pretend(), field, 0.001, rounds=2)}
    assert rows["broken"]["error"] == "RuntimeError: broken fails"
    assert rows["nan"]["error"] == "ArithmeticError: the loss is nan"
    assert rows["late"]["error"] == "RuntimeError: late fails"
    assert list(rows["good"]["ratios"]) == ["bce"]
    assert all(row["stage"] == "step" and row["image_size"] == [8, 9] for row in rows.values())
