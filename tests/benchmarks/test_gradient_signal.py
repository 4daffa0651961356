import itertools

import pytest
import torch

from benchmarks.gradient_signal import (
    BATCHES,
    WARM,
    Gradients,
    by_level,
    look,
    losses,
    shares,
    table,
)
from benchmarks.trainings import training_parser
from ghm_triton import ghm_c_loss


def test_agreement_is_the_mean_product_of_two_batches():
    gradients = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double()
    seen = Gradients()
    for gradient in gradients:
        seen.add(gradient)
    products = [float(a @ b) for a, b in itertools.permutations(gradients, 2)]
    squares = [float(a @ a) for a in gradients]
    expected = (sum(products) / len(products)) / (sum(squares) / len(squares))
    assert seen.agreement() == pytest.approx(expected, rel=1e-12)
    assert seen.mean_norm() == pytest.approx(float(gradients.mean(0).norm()), rel=1e-12)
    assert seen.rms() == pytest.approx((sum(squares) / 5) ** 0.5, rel=1e-12)


def test_shares_are_of_the_gradient_that_counts():
    logits = torch.tensor([[[0.0, -4.0], [4.0, -4.0], [9.0, 9.0]]])
    labels = torch.tensor([[1, 2, -1]])  # the second class, background, ignored
    slope = torch.tensor([[[-1.0, 3.0], [2.0, 4.0], [100.0, 100.0]]])
    found = shares(slope, logits, labels)
    # Norms: 0.5 and 0.982 (positive) in the first row, 0.982 and 0.018 in the second.
    assert found["positives"] == pytest.approx(0.3)
    assert found["hard"] == pytest.approx(0.5)
    assert found["easy"] == pytest.approx(0.4)
    assert found["thin"] == 1.0


def test_levels_count_apart():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 21 * 9, 3, generator=generator) * 3
    labels = torch.randint(0, 4, (2, 21 * 9), generator=generator)
    parts = zip(logits.split([144, 36, 9], 1), labels.split([144, 36, 9], 1), strict=True)
    expected = sum(ghm_c_loss(part, own, strength=1.0, reduction="sum") for part, own in parts)
    assert float(by_level(1.0)(logits, labels)) == pytest.approx(
        float(expected / (labels < 3).sum()), rel=1e-6
    )


def test_every_loss_looks_at_one_network(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.gradient_signal.BATCHES", 2)
    monkeypatch.setattr("benchmarks.gradient_signal.WARM", 1)
    assert (BATCHES, WARM) == (32, 8)
    words = "--data digits:images=16,held_out_images=4 --steps 1 --batch-size 4 --channels 16"
    found = look(training_parser("", tmp_path / "x").parse_args(words.split()), 0)
    assert found.keys() == losses().keys()
    for name, row in found.items():
        assert 0 < row["positives"] < 1, name
        assert row["easy"] + row["hard"] <= 1 + 1e-6, name  # sums in float32
    # Harmonizing multiplies the classification's gradient, the more the stronger.
    pull = [found[f"GHM-C, strength {s}"]["rms_to_reg"] for s in ("0.25", "0.5", "1")]
    assert found["cross entropy"]["rms_to_reg"] < pull[0] < pull[1] < pull[2]
    rows = [
        {"data": "d", "steps": 1, "seed": 0, "loss": name, **row} for name, row in found.items()
    ]
    assert len(table(rows).splitlines()) == 2 + len(rows)
