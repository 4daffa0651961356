"""From counts to weights, by either implementation, against the loops of the paper."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghm_triton import gradient_density
from ghm_triton.reference import RegionCounts
from ghm_triton.reference.density import fine_regions, stream_density, update_window

BINS = 6
UNDIVIDED = {"divisor": None, "factor": 1.0}
BATCHES = [
    [5, 0, 3, 1, 0, 90],
    [0, 0, 8, 1, 2, 40],
    [1000000, 7, 0, 0, 0, 1],
    [0, 0, 0, 0, 0, 0],
    [3, 3, 3, 3, 3, 3],
]


def counts_on(device, regions, invalid=0, positives=(0,)):
    return RegionCounts(
        torch.tensor(regions, device=device),
        torch.tensor(positives, dtype=torch.float64, device=device),
        torch.tensor(invalid, device=device),
    )


def new_state(device):
    smoothed = torch.zeros(BINS, device=device)
    return smoothed, torch.zeros((), dtype=torch.int64, device=device)


def truth_of(paper, regions, state, **options):
    """The weight of every region, from as many entries as were counted."""
    norms = np.concatenate([np.full(n, (j + 0.5) / BINS) for j, n in enumerate(regions)] or [[]])
    weights, _ = paper.harmonize(norms, np.ones_like(norms, bool), BINS, state=state, **options)
    starts = np.cumsum([0, *regions[:-1]])
    return [weights[s] if n else 0.0 for s, n in zip(starts, regions, strict=True)]


@pytest.mark.parametrize("ema", ["debiased", "mmdet"])
@pytest.mark.parametrize("normalizer", ["valid_bins", "bins"])
@pytest.mark.parametrize("momentum", [0.0, 0.75, 0.999])
def test_several_batches(paper, device, kernels, ema, normalizer, momentum):
    options = {"momentum": momentum, "ema": ema, "normalizer": normalizer, "max_weight": None}
    check_several_batches(paper, device, kernels, 0.5, options)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("max_weight", [None, 1.3])
def test_strength_and_bound(paper, device, kernels, strength, max_weight):
    options = {"momentum": 0.9, "ema": "debiased", "normalizer": "bins", "max_weight": max_weight}
    check_several_batches(paper, device, kernels, strength, options)


def check_several_batches(paper, device, kernels, strength, options):
    smoothed, updates = new_state(device)
    state = paper.Average(np.zeros(BINS))
    for regions in BATCHES:
        expected = truth_of(paper, regions, state, strength=strength, **options)
        weights, _ = kernels.update_density(
            counts_on(device, regions),
            smoothed,
            updates,
            torch.tensor(strength, device=device),
            persist=True,
            **UNDIVIDED,
            **options,
        )
        paper.assert_close(weights, expected)
        # Each update rounds three times, and what it rounded is in the next.
        paper.assert_close(smoothed, state.smoothed)
        assert int(updates) == state.updates
    assert int(updates) == 4  # the empty batch is none


@pytest.mark.parametrize("invalid", [1, 3])
def test_an_invalid_entry_poisons_the_weights_and_not_the_state(device, kernels, invalid):
    smoothed, updates = new_state(device)
    smoothed += 5
    updates += 3
    weights, _ = kernels.update_density(
        counts_on(device, BATCHES[0], invalid),
        smoothed,
        updates,
        torch.tensor(1.0, device=device),
        momentum=0.5,
        ema="debiased",
        normalizer="bins",
        max_weight=None,
        persist=True,
        **UNDIVIDED,
    )
    assert weights.isnan().all()
    assert smoothed.tolist() == [5.0] * BINS
    assert int(updates) == 3


def test_without_persist_it_weighs_alike_and_stores_nothing(device, kernels):
    results = []
    for persist in (False, True):
        smoothed, updates = new_state(device)
        smoothed += 5
        updates += 3
        weights, _ = kernels.update_density(
            counts_on(device, BATCHES[0]),
            smoothed,
            updates,
            torch.tensor(0.5, device=device),
            momentum=0.5,
            ema="debiased",
            normalizer="bins",
            max_weight=None,
            persist=persist,
            **UNDIVIDED,
        )
        results.append((weights.tolist(), smoothed.tolist(), int(updates)))
    assert results[0][0] == results[1][0]
    assert results[0][1:] == ([5.0] * BINS, 3)
    assert results[1][2] == 4
    assert results[1][1] != [5.0] * BINS


def test_strength_one_and_zero_are_exact(device, kernels):
    odd = np.float32(539) / np.array([3, 10, 61, 129, 17, 319], np.float32) / np.float32(6)
    for regions, strength, expected in (
        ([3] * 6, 1.0, [1.0] * 6),
        ([3, 10, 61, 129, 17, 319], 1.0, odd.tolist()),
        ([4, 9, 0, 1, 0, 0], 0.0, [1.0, 1.0, 0, 1.0, 0, 0]),
    ):
        smoothed, updates = new_state(device)
        weights, _ = kernels.update_density(
            counts_on(device, regions),
            smoothed,
            updates,
            torch.tensor(strength, device=device),
            momentum=0.0,
            ema="debiased",
            normalizer="valid_bins",
            max_weight=None,
            persist=True,
            **UNDIVIDED,
        )
        assert weights.tolist() == expected


@pytest.mark.parametrize(
    ("divisor", "regions", "positives", "expected"),
    [
        (None, BATCHES[0], [7], 3.0),
        ("valid", BATCHES[0], [7], 3.0 / 99),
        ("valid", BATCHES[3], [0], 3.0),  # at least one, so that an empty batch is 0 and not NaN
        ("positives", BATCHES[0], [0.25, 0, 2.25], 3.0 / 2.5),
        ("positives", BATCHES[0], [0.25] * 2, 3.0),
        ("positives", BATCHES[0], [1e-3] * 1000 + [1e9] * 24, 3.0 / (24e9 + 1)),
    ],
)
def test_the_scale_of_the_sum(device, kernels, divisor, regions, positives, expected):
    assert scale_of(device, kernels, divisor, regions, positives) == np.float32(expected)


@pytest.mark.parametrize("divisor", [None, "valid", "positives"])
def test_an_invalid_entry_poisons_the_scale(device, kernels, divisor):
    assert np.isnan(scale_of(device, kernels, divisor, BATCHES[0], [1], invalid=1))


def scale_of(device, kernels, divisor, regions, positives, invalid=0):
    smoothed, updates = new_state(device)
    _, scale = kernels.update_density(
        counts_on(device, regions, invalid, positives),
        smoothed,
        updates,
        torch.tensor(1.0, device=device),
        momentum=0.5,
        ema="debiased",
        normalizer="bins",
        max_weight=None,
        persist=True,
        divisor=divisor,
        factor=3.0,
    )
    assert scale.dtype == torch.float32
    assert scale.shape == ()
    return float(scale)


class TestFineRegions:
    @pytest.mark.parametrize(
        ("bins", "fine"), [(1, 1023), (2, 1022), (10, 1010), (30, 990), (204, 1020), (341, 1023)]
    )
    def test_an_odd_number_a_bin_and_1024_at_most(self, paper, bins, fine):
        assert fine_regions(bins) == paper.fine_regions(bins) == fine

    def test_every_number_of_bins(self, paper):
        assert [fine_regions(b) for b in range(1, 342)] == [
            paper.fine_regions(b) for b in range(1, 342)
        ]

    @pytest.mark.parametrize("bins", [342, 1024])
    def test_too_many(self, bins):
        with pytest.raises(ValueError, match=f"each of at most 341 bins .* got bins={bins}"):
            fine_regions(bins)


class TestStreamDensity:
    @pytest.mark.parametrize("bins", [1, 2, 7, 30, 341])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_it_is_the_sum_of_the_window(self, paper, device, bins, dtype):
        counts = np.random.default_rng(bins).integers(0, 1000, fine_regions(bins))
        ours = stream_density(torch.tensor(counts, dtype=dtype, device=device), bins)
        assert ours.dtype == dtype
        paper.assert_close(ours, paper.streaming_density(counts, bins), ulps=4)

    def test_a_sparse_window_beside_a_crowd_keeps_its_digits(self, paper):
        # By prefix sums in float32 the few would be lost beside a hundred million.
        counts = np.zeros(fine_regions(30))
        counts[0], counts[100:] = 1e8, 0.25
        ours = stream_density(torch.tensor(counts, dtype=torch.float32), 30)
        paper.assert_close(ours, paper.streaming_density(counts, 30), ulps=4)


@st.composite
def crowded_norms(draw):
    """Norms where the bound is put to the test: crowds, ties, pairs half a window apart, ends.

    In quarters of a fine region and never on an edge between two, so that float64 surely counts
    every norm where it belongs; but at 0 and 1 exactly.
    """
    bins = draw(st.sampled_from([1, 2, 3, 10, 30, 100, 341]))
    fine = fine_regions(bins)
    half_window = 2 * fine // bins  # in quarters
    place = st.builds(lambda j, r: 4 * j + r, st.integers(0, fine - 1), st.integers(1, 3))
    ticks = draw(st.lists(place, min_size=1, max_size=12))
    for tick in draw(st.lists(st.sampled_from(ticks), max_size=12)):
        ticks.append(tick + draw(st.sampled_from([-1, 1])) * half_window + draw(st.integers(-4, 4)))
    ticks += draw(st.lists(st.sampled_from([0, 4 * fine]), max_size=2))
    ticks = [t for t in ticks if 0 <= t <= 4 * fine and (t % 4 or t in (0, 4 * fine))]
    crowd = [draw(st.sampled_from([1, 2, 30])) for _ in ticks]
    return np.repeat(np.array(ticks) / (4 * fine), crowd), bins


def bound_of(paper, norms, ours, bins):
    """The bound that `stream_density` states, entry by entry."""
    fine = fine_regions(bins)
    own = paper.region(norms, fine)
    reach = (fine // bins - 1) // 2
    counts = np.zeros(3 * fine + 2)
    np.add.at(counts, fine + own, 1)
    ends = [own + step for step in (-reach - 1, -reach, reach, reach + 1)]
    largest = np.max([counts[fine + end] for end in ends], axis=0)
    half = 0.5 / bins
    centre = (own + 0.5) / fine
    least, most = np.minimum(norms, centre), np.maximum(norms, centre)
    cut = (least < half) | (most > 1 - half)
    length = np.minimum(norms + half, 1) - np.maximum(norms - half, 0)
    return (largest + np.where(cut, 0.5 / fine, 0) * ours) / length


class TestTheBound:
    @given(crowded_norms())
    @settings(max_examples=150, deadline=None)
    def test_it_holds(self, paper, drawn):
        self.check(paper, *drawn)

    @pytest.mark.parametrize("bins", [1, 7, 30, 341])
    @pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
    def test_it_holds_for_plenty(self, paper, bins, spread):
        logits = np.random.default_rng(7).normal(0, 1, 1500) * spread
        self.check(paper, paper.sigmoid(logits), bins)

    @staticmethod
    def check(paper, norms, bins):
        ours = gradient_density(torch.tensor(norms), bins, density="streaming").double().numpy()
        exact = paper.exact_density(norms, np.ones(len(norms), bool), bins)
        error = np.abs(ours - exact)
        # The answer is rounded to float32.
        assert (error <= bound_of(paper, norms, ours, bins) + paper.EPS32 * ours).all()

    @pytest.mark.parametrize(("near", "far"), [(3, 0.5), (1, -0.5)])
    @pytest.mark.parametrize("end", [-1, 1])
    def test_it_is_reached(self, paper, near, far, end):
        """A crowd between the end of the window about the centre and the end of one's own."""
        fine = fine_regions(30)
        own = fine // 2
        norms = np.array(
            [(own + near / 4) / fine] + 50 * [(own + 0.5 + end * 16.5 + far / 4) / fine]
        )
        ours = gradient_density(torch.tensor(norms), 30, density="streaming").double().numpy()
        exact = paper.exact_density(norms, np.ones(51, bool), 30)
        error = np.abs(ours - exact)[0]
        assert error == pytest.approx(50 * 30)
        assert error == pytest.approx(bound_of(paper, norms, ours, 30)[0])

    def test_it_is_reached_at_the_end(self, paper):
        """Easy negatives at g = 0: the window about the centre is one half region longer."""
        norms = np.zeros(50)
        ours = gradient_density(torch.tensor(norms), 30, density="streaming").double().numpy()
        assert ours[0] == pytest.approx(50 * 60 * 33 / 34)
        error = 50 * 60 - ours[0]
        assert error == pytest.approx(bound_of(paper, norms, ours, 30)[0])


class TestUpdateWindow:
    BINS = 70  # 15 fine regions each

    def counts(self, generator, most, share):
        fine = fine_regions(self.BINS)
        regions = torch.randint(0, most, (fine,), generator=generator)
        return regions * (torch.rand(fine, generator=generator) < share)

    def state(self, device):
        fine = fine_regions(self.BINS)
        return torch.zeros(fine, device=device), torch.zeros((), dtype=torch.int64, device=device)

    @pytest.mark.parametrize("ema", ["debiased", "mmdet"])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize(("strength", "max_weight"), [(1.0, None), (0.5, 1.3), (0.0, None)])
    def test_several_batches(self, paper, device, ema, momentum, strength, max_weight):
        generator = torch.Generator().manual_seed(5)
        options = {"momentum": momentum, "ema": ema, "max_weight": max_weight}
        smoothed, updates = self.state(device)
        state = paper.Average(np.zeros(len(smoothed)))
        for most, share in [(5, 0.2), (100, 0.01), (2, 0.0), (2, 0.5)]:
            regions = self.counts(generator, most, share)
            weights, _ = update_window(
                counts_on(device, regions.tolist()),
                smoothed,
                updates,
                torch.tensor(strength, device=device),
                bins=self.BINS,
                persist=True,
                **UNDIVIDED,
                **options,
            )
            norms = np.repeat((np.arange(len(regions)) + 0.5) / len(regions), regions)
            expected, _ = paper.harmonize(
                norms,
                np.ones_like(norms, bool),
                self.BINS,
                density="streaming",
                strength=strength,
                state=state,
                **options,
            )
            paper.assert_close(
                weights[regions.to(device) > 0].repeat_interleave(regions[regions > 0].to(device)),
                expected,
            )
            assert not weights[regions.to(device) == 0].any()
            paper.assert_close(smoothed, state.smoothed)
            assert int(updates) == state.updates
        assert int(updates) == 3  # the empty batch is none

    @pytest.mark.parametrize(("persist", "invalid"), [(False, 0), (True, 2)])
    def test_what_leaves_no_trace(self, device, persist, invalid):
        smoothed, updates = self.state(device)
        smoothed += 5
        updates += 3
        regions = self.counts(torch.Generator().manual_seed(5), 9, 0.5).tolist()
        weights, scale = update_window(
            counts_on(device, regions, invalid, [4.0]),
            smoothed,
            updates,
            torch.tensor(1.0, device=device),
            bins=self.BINS,
            momentum=0.5,
            ema="debiased",
            max_weight=None,
            persist=persist,
            divisor="positives",
            factor=3.0,
        )
        assert bool(weights.isnan().all()) == bool(invalid)
        assert bool(scale.isnan()) == bool(invalid)
        assert invalid or float(scale) == 0.75
        assert set(smoothed.tolist()) == {5.0}
        assert int(updates) == 3
