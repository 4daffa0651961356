"""The sliding window by sorting, against its definition pair by pair."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghm_triton.losses.inputs import classification_inputs, regression_inputs
from ghm_triton.reference.density import weigh_entries, window_density

BINS = [1, 2, 3, 10, 30, 341, 1024]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


def check_density(paper, device, norm, bins, valid=None, ulps=4.0):
    """Ours is the definition's, to the rounding of a length and a division."""
    kept = torch.ones(norm.shape, dtype=torch.bool) if valid is None else valid
    expected = paper.exact_density(paper.as_numpy(norm), kept.numpy(), bins)
    given = None if valid is None else valid.to(device)
    ours = window_density(norm.to(device), bins, given)
    assert ours.dtype == norm.dtype
    assert ours.shape == norm.shape
    paper.assert_close(ours.cpu()[kept], expected[kept.numpy()], ulps=ulps)


class TestWindowDensity:
    @pytest.mark.parametrize("bins", BINS)
    @pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
    def test_float64(self, paper, device, generator, bins, spread):
        # Logits of spread 0 are 500 equal norms; of 3, most lie near the ends.
        norm = torch.sigmoid(torch.randn(500, generator=generator).double() * spread)
        check_density(paper, device, norm, bins)

    @pytest.mark.parametrize("bins", [1, 10, 30])
    def test_float32(self, paper, device, generator, bins):
        norm = torch.rand(300, generator=generator)
        for _ in range(20):
            unsafe = ~torch.from_numpy(paper.away_from_windows(paper.as_numpy(norm), bins))
            norm = torch.where(unsafe, torch.rand(300, generator=generator), norm)
        assert not unsafe.any()
        check_density(paper, device, norm, bins)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @given(data=st.data())
    @settings(max_examples=60, deadline=None)
    def test_exact_edges(self, paper, dtype, data):
        """Powers of two: every norm and every edge is held, and half the pairs lie on edges."""
        bins = data.draw(st.sampled_from([1, 2, 4, 16]))
        steps = data.draw(st.sampled_from([2, 4, 8]))
        cells = st.integers(0, bins * steps)
        norm = torch.tensor(data.draw(st.lists(cells, min_size=1, max_size=60)), dtype=dtype)
        norm = norm / (bins * steps)
        valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(norm))))[: len(norm)]
        check_density(paper, "cpu", norm, bins, valid)

    def test_the_window_is_half_open(self, device):
        norm = torch.tensor([0.25, 0.5, 0.75, 0.0, 1.0], device=device)
        # At 2 bins the window is g - 1/4 <= g_k < g + 1/4, and half as long at the ends.
        assert window_density(norm, 2).tolist() == [4.0, 4.0, 4.0, 4.0, 8.0]

    def test_a_density_is_that_of_the_entries_place(self, paper, device, generator):
        norm = torch.rand(6, 50, generator=generator).double()
        check_density(paper, device, norm, 10)
        transposed = window_density(norm.to(device).t(), 10)
        assert torch.equal(transposed.t(), window_density(norm.to(device), 10))
        check_density(paper, device, norm[0, 0], 10)

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 0.5])
    def test_what_is_not_valid_is_nowhere(self, paper, device, generator, poison):
        norm = torch.rand(200, generator=generator).double()
        valid = torch.rand(200, generator=generator) < 0.6
        norm[~valid] = poison
        expected = window_density(norm[valid].to(device), 10)
        ours = window_density(norm.to(device), 10, valid.to(device))
        assert torch.equal(ours[valid.to(device)], expected)

    def test_none_and_no_valid_ones(self, device):
        assert window_density(torch.zeros(0, 3, device=device), 10).shape == (0, 3)
        nobody = torch.zeros(4, dtype=torch.bool, device=device)
        assert window_density(torch.zeros(4, device=device), 10, nobody).shape == (4,)

    def test_more_than_can_be_sorted(self):
        with pytest.raises(ValueError, match=r"at most 2147483647 .* got 2147483648; density='str"):
            window_density(torch.zeros(1).expand(2**31), 10)


class TestWeights:
    """`label_weight` made anew: what selects, what multiplies, and what must not vanish."""

    @staticmethod
    def weighed(weight, max_weight=None, weighted=False, strength=1.0, pred=0.0):
        inputs = regression_inputs(torch.full((4, 1), pred), torch.zeros(4, 1), weight, False)
        strength = torch.tensor(strength)
        out = weigh_entries(inputs, 2, strength, max_weight, weighted=weighted)
        assert out.weight.dtype == torch.float32
        return out.weight.flatten().tolist()

    def test_it_selects_and_multiplies(self):
        # Two valid entries at g = 0, where a window of two bins is 1/4 long: 2 / (2 / 0.25).
        weight = torch.tensor([[0.0], [3.0], [0.5], [0.0]])
        assert self.weighed(weight) == [0.0, 0.25, 0.25, 0.0]
        assert self.weighed(weight, weighted=True) == [0.0, 0.75, 0.125, 0.0]
        assert self.weighed(weight, weighted=True, strength=0.5) == [0.0, 1.5, 0.25, 0.0]
        assert self.weighed(None, weighted=True) == [0.25] * 4

    def test_the_bound_is_of_beta(self):
        weight = torch.tensor([[0.0], [3.0], [0.5], [1.0]])
        assert self.weighed(weight, max_weight=0.125) == [0.0, 0.125, 0.125, 0.125]
        assert self.weighed(weight, 0.125, weighted=True) == [0.0, 0.375, 0.0625, 0.125]

    def test_an_invalid_entry_stays_selected(self):
        weight = torch.tensor([[0.0], [3.0], [0.5], [1.0]])
        assert [w > 0 for w in self.weighed(weight, pred=torch.nan)] == [False, True, True, True]
        target = torch.tensor([[7.5], [0.5], [-3.0], [torch.nan]])
        inputs = classification_inputs(torch.zeros(4, 1), target, None, False)
        for weighted in (False, True):
            out = weigh_entries(inputs, 10, torch.tensor(1.0), None, weighted=weighted)
            assert (out.weight > 0).all()

    def test_a_multiplier_that_vanishes_is_no_one(self):
        weight = torch.full((4, 1), 1e-45, dtype=torch.float64)  # times 0.25: below float32
        assert self.weighed(weight, weighted=True) == [0.0] * 4

    def test_everything_else_is_passed_on(self, generator):
        logits = torch.randn(5, 3, generator=generator)
        for target in (torch.zeros(5, dtype=torch.int64), torch.zeros(5, 3)):
            inputs = classification_inputs(logits, target, None, None)
            out = weigh_entries(inputs, 10, torch.tensor(1.0), None, weighted=False)
            assert out.logits is inputs.logits
            assert out.index is inputs.index
            assert out.target is inputs.target
            assert out.shape == inputs.shape
            assert np.prod(out.weight.shape) == 15
