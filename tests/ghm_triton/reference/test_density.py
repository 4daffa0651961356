"""From counts to weights, by either implementation, against the loops of the paper."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghm_triton import gradient_density, reference
from ghm_triton.reference.density import fine_regions, stream_density
from ghm_triton.reference.interface import DensityOptions, DensityState, RegionCounts

BINS = 6
BATCHES = [
    [5, 0, 3, 1, 0, 90],
    [0, 0, 8, 1, 2, 40],
    [1000000, 7, 0, 0, 0, 1],
    [0, 0, 0, 0, 0, 0],
    [3, 3, 3, 3, 3, 3],
]


class Weigher:
    """Calls of `update_density` on one state."""

    def __init__(self, kernels, device, bins=BINS, average=0.0, updates=0):
        self.kernels, self.device = kernels, device
        self.smoothed = torch.full((bins,), average, device=device)
        self.updates = torch.full((), updates, device=device)

    def __call__(self, regions, invalid=0, positives=(0,), strength=1.0, window=None, **options):
        counts = RegionCounts(
            torch.as_tensor(regions, device=self.device),
            torch.tensor(positives, dtype=torch.float64, device=self.device),
            torch.tensor(invalid, device=self.device),
        )
        strength = torch.tensor(strength, device=self.device)
        state = DensityState(self.smoothed, self.updates, strength)
        more = {} if window is None else {"window": window}
        return self.kernels.update_density(counts, state, DensityOptions(**options), **more)

    @property
    def state(self):
        return self.smoothed.tolist(), int(self.updates)


def norms_of(regions):
    """As many gradient norms in the middle of each region as were counted."""
    return np.repeat((np.arange(len(regions)) + 0.5) / len(regions), regions)


def truth_of(paper, regions, state, **options):
    """The weight of every region that holds an entry, and 0."""
    norms = norms_of(regions)
    weights, _ = paper.harmonize(norms, np.ones_like(norms, bool), BINS, state=state, **options)
    starts = np.cumsum([0, *regions[:-1]])
    return [weights[s] if n else 0.0 for s, n in zip(starts, regions, strict=True)]


@pytest.mark.parametrize(
    ("momentum", "ema", "normalizer", "max_weight", "strength"),
    [
        *itertools.product(
            [0.0, 0.75, 0.999], ["debiased", "mmdet"], ["valid_bins", "bins"], [None], [0.5]
        ),
        *itertools.product([0.9], ["debiased"], ["bins"], [None, 1.3], [0.0, 0.25, 1.0]),
    ],
)
def test_several_batches(paper, device, kernels, momentum, ema, normalizer, max_weight, strength):
    options = {
        "momentum": momentum,
        "ema": ema,
        "normalizer": normalizer,
        "max_weight": max_weight,
        "strength": strength,
    }
    weigh, state = Weigher(kernels, device), paper.Average(np.zeros(BINS))
    for regions in BATCHES:
        expected = truth_of(paper, regions, state, **options)
        paper.assert_close(weigh(regions, **options)[0], expected)
        # Each update rounds three times, and what it rounded is in the next.
        paper.assert_close(weigh.smoothed, state.smoothed)
        assert int(weigh.updates) == state.updates
    assert int(weigh.updates) == 4  # the empty batch is none


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("invalid", [0, 3])
def test_implementations_agree_with_the_specification(device, kernels, strength, invalid):
    """For every combination of options, with counts that float32 rounds."""
    several = (
        [0.0, 0.75, 0.999] if device.type == "cuda" or kernels.__name__.endswith("cpu") else [0.75]
    )
    for momentum, ema, normalizer, max_weight, divisor in itertools.product(
        several,
        ["debiased", "mmdet"],
        ["valid_bins", "bins"],
        [None, 1.3],
        [None, "valid", "positives"],
    ):
        options = {"momentum": momentum, "ema": ema, "normalizer": normalizer}
        options |= {"max_weight": max_weight, "divisor": divisor, "factor": 3.0}
        ours, theirs = Weigher(kernels, device, 4), Weigher(reference, "cpu", 4)
        for regions, persist in (
            ([5, 0, 3, 90], True),
            ([0, 0, 8, 2**40], True),
            ([0, 0, 0, 0], True),
            ([1, 1, 1, 1], False),
            ([0, 7, 0, 0], True),
        ):
            given = {"positives": [0.25, 1e9], "invalid": invalid * (regions[0] == 0)}
            given |= {"strength": strength, "persist": persist, **options}
            for mine, other in zip(ours(regions, **given), theirs(regions, **given), strict=True):
                # A power, which each library rounds its own way, and three divisions.
                torch.testing.assert_close(mine.cpu(), other, rtol=2e-6, atol=0.0, equal_nan=True)
            torch.testing.assert_close(ours.smoothed.cpu(), theirs.smoothed, rtol=2e-7, atol=0.0)
            assert int(ours.updates) == int(theirs.updates)


@pytest.mark.parametrize("bins", [1, 2, 3, 33, 1000])
def test_any_number_of_regions(device, kernels, poisoned, bins):
    generator = torch.Generator().manual_seed(7)
    ours, theirs = Weigher(kernels, device, bins), Weigher(reference, "cpu", bins)
    for _ in range(3):
        regions = torch.randint(0, 5, (bins,), generator=generator)
        options = {"momentum": 0.7, "strength": 0.6}
        weights, expected = ours(regions, **options)[0], theirs(regions, **options)[0]
        # exp(s log beta) against a power: an ulp or two of the exponent, about 5 here.
        torch.testing.assert_close(weights.cpu(), expected, rtol=2e-6, atol=0.0)
        torch.testing.assert_close(ours.smoothed.cpu(), theirs.smoothed, rtol=2e-7, atol=0.0)


def test_nothing_is_written_past_the_last_region(device, kernels):
    store = torch.full((64,), -7.0, device=device)
    weigh = Weigher(kernels, device, 5)
    weigh.smoothed = store[:5].zero_()
    options = {"momentum": 0.5, "normalizer": "bins"}
    weights, _ = weigh(torch.full((64,), 9, device=device)[:5], **options)
    assert weights.tolist() == [1.0] * 5
    assert store.tolist() == [4.5] * 5 + [-7.0] * 59


@pytest.mark.parametrize("invalid", [1, 3])
def test_an_invalid_entry_makes_weights_and_scale_nan_and_leaves_the_state(
    device, kernels, invalid
):
    for divisor in (None, "valid", "positives"):
        weigh = Weigher(kernels, device, average=5.0, updates=3)
        options = {"momentum": 0.5, "normalizer": "bins", "divisor": divisor}
        weights, scale = weigh(BATCHES[0], invalid, [1], **options)
        assert weights.isnan().all()
        assert scale.isnan()
        assert weigh.state == ([5.0] * BINS, 3)


def test_without_persist_weights_are_the_same_and_nothing_is_stored(device, kernels):
    kept, moved = (Weigher(kernels, device, average=5.0, updates=3) for _ in range(2))
    options = {"momentum": 0.5, "normalizer": "bins", "strength": 0.5}
    weights = kept(BATCHES[0], persist=False, **options)[0]
    assert torch.equal(weights, moved(BATCHES[0], persist=True, **options)[0])
    assert kept.state == ([5.0] * BINS, 3)
    assert moved.state[1] == 4
    assert moved.state[0] != [5.0] * BINS


def test_strength_one_and_zero_are_exact(device, kernels):
    odd = np.float32(539) / np.array([3, 10, 61, 129, 17, 319], np.float32) / np.float32(6)
    for regions, strength, expected in (
        ([3] * 6, 1.0, [1.0] * 6),
        ([3, 10, 61, 129, 17, 319], 1.0, odd.tolist()),
        ([4, 9, 0, 1, 0, 0], 0.0, [1.0, 1.0, 0, 1.0, 0, 0]),
    ):
        weights, _ = Weigher(kernels, device)(regions, strength=strength)
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
    given = {"positives": positives, "divisor": divisor, "factor": 3.0}
    _, scale = Weigher(kernels, device)(regions, **given)
    assert (scale.dtype, scale.shape) == (torch.float32, ())
    assert float(scale) == np.float32(expected)


def test_a_scale_beyond_float32_is_infinite_without_a_warning(device, kernels):
    assert Weigher(kernels, device)(BATCHES[0], factor=1e39)[1] == torch.inf


class TestFineRegions:
    def test_an_odd_number_per_bin_and_1024_at_most(self, paper):
        chosen = [fine_regions(bins) for bins in (1, 2, 10, 30, 204, 341)]
        assert chosen == [1023, 1022, 1010, 990, 1020, 1023]
        every = range(1, 342)
        assert list(map(fine_regions, every)) == list(map(paper.fine_regions, every))

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

    @pytest.mark.parametrize("ema", ["debiased", "mmdet"])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize(("strength", "max_weight"), [(1.0, None), (0.5, 1.3), (0.0, None)])
    def test_several_batches(self, paper, device, ema, momentum, strength, max_weight):
        generator = torch.Generator().manual_seed(5)
        options = {"momentum": momentum, "ema": ema, "max_weight": max_weight}
        options["strength"] = strength
        weigh = Weigher(reference, device, fine_regions(self.BINS))
        state = paper.Average(np.zeros(len(weigh.smoothed)))
        for most, share in [(5, 0.2), (100, 0.01), (2, 0.0), (2, 0.5)]:
            regions = self.counts(generator, most, share)
            weights = weigh(regions, window=self.BINS, **options)[0].cpu()
            norms = norms_of(regions)
            valid = np.ones_like(norms, bool)
            expected, _ = paper.harmonize(
                norms, valid, self.BINS, density="streaming", state=state, **options
            )
            paper.assert_close(weights.repeat_interleave(regions), expected)
            assert not weights[regions == 0].any()
            paper.assert_close(weigh.smoothed, state.smoothed)
            assert int(weigh.updates) == state.updates
        assert int(weigh.updates) == 3  # the empty batch is none

    @pytest.mark.parametrize(("persist", "invalid"), [(False, 0), (True, 2)])
    def test_evaluation_and_invalid_batches_leave_the_state(self, device, persist, invalid):
        weigh = Weigher(reference, device, fine_regions(self.BINS), average=5.0, updates=3)
        regions = self.counts(torch.Generator().manual_seed(5), 9, 0.5)
        options = {"momentum": 0.5, "persist": persist, "divisor": "positives", "factor": 3.0}
        weights, scale = weigh(regions, invalid, [4.0], window=self.BINS, **options)
        assert bool(weights.isnan().all()) == bool(scale.isnan()) == bool(invalid)
        assert invalid or float(scale) == 0.75
        assert set(weigh.smoothed.tolist()) == {5.0}
        assert int(weigh.updates) == 3
