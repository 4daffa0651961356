import numpy as np
import pytest
import torch

from benchmarks.study.report.gradients import (
    Histogram,
    contributions,
    focal_negative,
    focal_positive,
    harmonizing_weights,
    histogram_of,
)
from ghm_triton import focal_loss, ghm_c_loss


@pytest.mark.parametrize(("target", "formula"), [(1.0, focal_positive), (0.0, focal_negative)])
def test_focal_gradients_are_those_of_the_loss(target, formula):
    norm = torch.tensor([1e-3, 0.1, 0.4, 0.7, 0.999], dtype=torch.float64)
    logits = torch.logit(1 - norm if target else norm).requires_grad_()
    focal_loss(logits, torch.full_like(norm, target), reduction="sum").backward()
    # float64 on both sides: rounding of exp and log, a few units in the last place.
    np.testing.assert_allclose(formula(norm.numpy()), logits.grad.abs().numpy(), rtol=1e-9)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_harmonized_gradients_are_those_of_the_loss(strength):
    # Entries in the middle of 4 regions, one of them empty: 5, 0, 2 and 1.
    norm = torch.tensor([0.125] * 5 + [0.625] * 2 + [0.875], dtype=torch.float64)
    logits = torch.logit(norm).requires_grad_()
    loss = ghm_c_loss(
        logits, torch.zeros_like(norm), bins=4, strength=strength, reduction="sum", backend="torch"
    )
    loss.backward()
    histogram = Histogram(np.array([0.0, 0, 1, 0]), np.array([5.0, 0, 1, 1]))
    weights = harmonizing_weights(histogram, strength)
    assert np.isnan(weights).tolist() == [False, True, False, False]
    ours = (weights * histogram.centres)[[0, 0, 0, 0, 0, 2, 2, 3]]
    # The loss weighs in float32: 2^-24 a rounding, a few of them.
    np.testing.assert_allclose(ours, logits.grad.numpy(), rtol=1e-6)


def test_contributions_are_shares_of_counts_times_gradients():
    histogram = Histogram(np.array([2.0, 0, 1, 0]), np.array([6.0, 0, 1, 1]))
    shares = contributions(histogram, [0.25, 1.0])
    assert list(shares) == ["CE", "focal", "GHM 0.25", "GHM 1"]
    # 8 x 0.125, 2 x 0.625 and 1 x 0.875 make 3.125.
    np.testing.assert_allclose(shares["CE"], [0.32, np.nan, 0.4, 0.28])
    # At strength 1 every occupied region weighs its centre: 0.125 + 0.625 + 0.875 = 1.625.
    np.testing.assert_allclose(shares["GHM 1"], np.array([0.125, np.nan, 0.625, 0.875]) / 1.625)
    # beta^(1/4) ~ count^(-1/4), so shares go with count^(3/4) x centre.
    quarter = np.array([8**0.75 * 0.125, np.nan, 2**0.75 * 0.625, 0.875])
    np.testing.assert_allclose(shares["GHM 0.25"], quarter / np.nansum(quarter))
    # Focal tells positives from negatives: 0.25 (1 - p)^2 (1 - p - 2 p log p) of p = 1 - g, and
    # thrice that of a negative.
    g = np.array([0.125, 0.375, 0.625, 0.875])
    one = 0.25 * g**2 * (g - 2 * (1 - g) * np.log(1 - g))
    focal = np.array([20.0, np.nan, 4.0, 3.0]) * one
    np.testing.assert_allclose(shares["focal"], focal / np.nansum(focal))


def test_measured_gradients_take_the_place_of_guessed_ones():
    measured = {"ce": np.array([0.5, 0.0, 1.0, 1.0]), "focal": np.array([0.0, 0.0, 3.0, 1.0])}
    histogram = Histogram(np.array([2.0, 0, 1, 0]), np.array([6.0, 0, 1, 1]), measured)
    shares = contributions(histogram, [1.0])
    np.testing.assert_allclose(shares["CE"], [0.2, np.nan, 0.4, 0.4])
    np.testing.assert_allclose(shares["focal"], [0, np.nan, 0.75, 0.25])
    # Weights go with 1/8, 1/2 and 1.
    whole = np.array([0.5 / 8, np.nan, 0.5, 1.0])
    np.testing.assert_allclose(shares["GHM 1"], whole / np.nansum(whole))


def norms(positives, negatives, **gradients):
    return {"positives": positives, "negatives": negatives, **gradients}


def test_histograms_and_gradients_are_means_over_seeds_that_have_them():
    gradients = [{"ce": ce, "focal": [0.0, 1.0]} for ce in ([1.0, 2.0], [3.0, 6.0])]
    runs = [norms([1, 2], [10, 0], gradients=gradients[0]), None, {}]
    runs.append(norms([3, 2], [20, 1], gradients=gradients[1]))
    histogram = histogram_of(runs)
    np.testing.assert_array_equal(histogram.positives, [2, 2])
    np.testing.assert_array_equal(histogram.negatives, [15, 0.5])
    np.testing.assert_array_equal(histogram.total, [17, 2.5])
    np.testing.assert_array_equal(histogram.centres, [0.25, 0.75])
    np.testing.assert_array_equal(histogram.edges, [0, 0.5, 1])
    np.testing.assert_array_equal(histogram.gradients["ce"], [2, 4])
    del runs[-1]["gradients"]
    assert histogram_of(runs).gradients is None
    assert histogram_of([None, {}]) is None
