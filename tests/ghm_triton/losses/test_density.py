"""The state behind a harmonized loss."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghm_triton import GradientDensity, StrengthSchedule, reference


def counts_of(regions, invalid=0):
    regions = torch.as_tensor(regions)
    return reference.RegionCounts(
        regions, torch.zeros(1, dtype=torch.float64), torch.tensor(invalid)
    )


def weights_of(density, counts):
    return density.weigh(counts_of(counts), reference)[0]


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_a_cast_keeps_the_state_in_float32(cast):
    density = GradientDensity(3, momentum=0.5, strength=0.3)
    density.weigh(counts_of([100_001, 1, 0]), reference)  # above what float16 can hold
    before = density.smoothed.clone()
    getattr(torch.nn.Sequential(density), cast)()
    assert torch.equal(density.smoothed, before)
    assert density.smoothed.dtype == torch.float32
    assert density.strength.dtype == torch.float32
    assert float(density.strength) == pytest.approx(0.3)
    assert dict(density.named_buffers())["smoothed"] is density.smoothed


def test_to_moves_the_state():
    density = GradientDensity(3).to("meta", torch.float16)
    assert (density.smoothed.device.type, density.updates.device.type) == ("meta", "meta")
    assert density.smoothed.dtype == torch.float32
    assert GradientDensity(3, device=torch.device("meta")).strength.device.type == "meta"


def test_memory_that_was_never_written_is_filled_anew():
    density = GradientDensity(3, momentum=0.5, strength=0.3).to("meta")
    assert "strength=0.3" in repr(density)
    density.to_empty(device="cpu")
    for buffer in density.buffers():
        buffer.fill_(77)
    density.reset_parameters()
    assert float(density.strength) == pytest.approx(0.3)
    assert density.smoothed.tolist() == [0, 0, 0]
    assert int(density.updates) == 0


def test_a_copy_has_an_average_of_its_own():
    density = GradientDensity(2, momentum=0.5)
    density.register_forward_hook(density.extra_repr)  # bound to what is being copied
    twin = copy.deepcopy(torch.nn.ModuleList([density, density]))
    assert twin[0] is twin[1]
    assert next(iter(twin[0]._forward_hooks.values())).__self__ is twin[0]
    density.weigh(counts_of([5, 1]), reference)
    assert not twin[0].smoothed.any()
    assert weights_of(twin[0], [3, 1]).tolist() == weights_of(GradientDensity(2), [3, 1]).tolist()


def test_the_state_survives_a_checkpoint_and_the_configuration_is_not_in_it():
    density = GradientDensity(3, momentum=0.5, strength=0.3)
    density.weigh(counts_of([5, 1, 0]), reference)
    file = io.BytesIO()
    torch.save(density.state_dict(), file)
    file.seek(0)
    restored = GradientDensity(3, momentum=0.5, strength=0.9)
    restored.load_state_dict(torch.load(file))
    assert set(restored.state_dict()) == {"smoothed", "updates"}
    assert float(restored.strength) == pytest.approx(0.9)
    assert torch.equal(restored.smoothed, density.smoothed)
    assert int(restored.updates) == 1
    restored.reset()
    assert int(restored.updates) == 0
    assert not restored.smoothed.any()


def test_a_schedule_follows_the_updates():
    density = GradientDensity(2, strength=StrengthSchedule(1.0, 0.0, steps=2))
    seen = []
    for _ in range(4):
        seen.append(float(density.current_strength()))
        density.weigh(counts_of([3, 1]), reference)
    assert seen == [1.0, 0.5, 0.0, 0.0]
    density.weigh(counts_of([3, 1], invalid=1), reference)
    density.weigh(counts_of([0, 0]), reference)
    assert int(density.updates) == 4  # a batch that teaches nothing is no update


@pytest.mark.parametrize(
    ("density", "regions"), [("unit_region", 30), ("exact", 1), ("streaming", 990)]
)
def test_what_each_density_keeps(density, regions):
    state = GradientDensity(30, momentum=0.5, density=density)
    assert (state.method, state.regions, state.bins) == (density, regions, 30)
    counts = torch.arange(1, regions + 1)
    for _ in range(2):
        state.weigh(counts_of(counts), reference)
    restored = GradientDensity(30, momentum=0.5, density=density)
    restored.load_state_dict(state.state_dict())
    assert int(restored.updates) == 2
    assert restored.smoothed.tolist() == ([1.0] if regions == 1 else (0.75 * counts).tolist())
    assert f"density={density!r}" in repr(state)


def test_exact_weighs_its_one_region_1():
    """Whatever the options: the entries have weights of their own."""
    for strength in (0.0, 0.3, 1.0):
        state = GradientDensity(
            30, 0.9, strength, normalizer="bins", ema="mmdet", max_weight=0.5, density="exact"
        )
        for total in (7, 1_000_000, 3):
            assert weights_of(state, [total]).tolist() == [1.0]
            assert state.smoothed.tolist() == [float(total)]
        weights, scale = state.weigh(counts_of([3], invalid=1), reference, "valid", 2.0)
        assert weights.isnan().all()
        assert scale.isnan()
        assert state.weigh(counts_of([4]), reference, "valid", 2.0)[1] == 0.5
        assert int(state.updates) == 4


def test_a_state_of_another_density_is_refused_and_both_are_named():
    saved = torch.nn.ModuleDict({"loss": GradientDensity(30)}).state_dict()
    other = torch.nn.ModuleDict({"loss": GradientDensity(30, density="streaming")})
    with pytest.raises(
        RuntimeError,
        match=r"loss.smoothed counts 990 regions here \(bins=30, density='streaming'\) and 30 in"
        " the checkpoint: it was saved with other bins or another density",
    ):
        other.load_state_dict(saved)


@given(
    regions=st.lists(st.integers(0, 10**6), min_size=1, max_size=40).filter(any),
    normalizer=st.sampled_from(["valid_bins", "bins"]),
)
@settings(max_examples=50, deadline=None)
def test_regions_weigh_alike_in_sum(regions, normalizer):
    """Harmony: without an average every occupied region gets N / n, all of them N (or less)."""
    density = GradientDensity(len(regions), normalizer=normalizer)
    counts = torch.tensor(regions)
    share = (weights_of(density, counts).double() * counts)[counts > 0]
    occupied, total = len(share), int(counts.sum())
    n = occupied if normalizer == "valid_bins" else len(regions)
    # Two divisions in float32, and the rounding of N and R.
    torch.testing.assert_close(share, torch.full_like(share, total / n), rtol=4e-7, atol=0)


@given(
    momentum=st.floats(0.0, 0.99),
    batches=st.lists(
        st.lists(st.integers(0, 1000), min_size=4, max_size=4).filter(any), min_size=1, max_size=6
    ),
)
@settings(max_examples=50, deadline=None)
def test_the_debiased_average_of_equal_batches_is_the_batch(momentum, batches):
    """No warm-up: the released average overweighs by 1 / (1 - a^t), 4x at the first update."""
    fresh = GradientDensity(4)
    density = GradientDensity(4, momentum=momentum)
    for _ in range(len(batches)):
        weights = weights_of(density, batches[0])
    expected = weights_of(fresh, batches[0])
    # 1 - a^t and a S + (1 - a) R round anew at every update; at a = 0.99 and t = 1, to 1e-5.
    torch.testing.assert_close(weights, expected, rtol=5e-5, atol=0)


def test_its_repr_tells_the_configuration():
    text = repr(GradientDensity(7, momentum=0.5, strength=0.25, ema="mmdet"))
    assert "bins=7, momentum=0.5, strength=0.25" in text
    assert "ema='mmdet'" in text
    schedule = repr(GradientDensity(7, strength=StrengthSchedule(0.5, 0.0, 9)))
    assert "StrengthSchedule(start=0.5, end=0.0, steps=9" in schedule
