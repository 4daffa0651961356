import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from ghm_triton import GHMCLoss, GHMRLoss, StrengthSchedule
from ghm_triton.losses.density import GradientDensity
from ghm_triton.monitor import (
    DensityMonitor,
    PositivesMonitor,
    find_densities,
    shares_by_band,
)


class Recorder:
    """What of a `SummaryWriter` is used."""

    def __init__(self):
        self.scalars, self.texts, self.bars = {}, [], {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag] = value

    def add_text(self, tag, text, step):
        self.texts.append((tag, text, step))

    def add_histogram_raw(self, tag, bucket_counts, **rest):
        self.bars[tag] = bucket_counts


def counted(entries, *, updates=1, **options):
    """A density that counted these entries."""
    density = GradientDensity(len(entries), **options)
    density.smoothed.copy_(torch.tensor(entries))
    density.updates.fill_(updates)
    return density


@pytest.fixture
def recorder():
    return Recorder()


def logged(density, **options):
    recorder = Recorder()
    DensityMonitor(recorder, density).log(0, **options)
    return recorder


class TestDensityMonitor:
    def test_an_event_file_holds_the_shares_of_the_batch_itself(self, tmp_path):
        """Counted anew from the norms of the batch in float64, not asked of the density."""
        generator = torch.Generator().manual_seed(0)
        logits = 4 * torch.randn(3000, 4, generator=generator)
        labels = torch.randint(0, 5, (3000,), generator=generator)
        model = nn.ModuleDict({"head": nn.ModuleDict({"loss": GHMCLoss(bins=20, momentum=0.0)})})
        model["head"]["loss"](logits, labels)
        with SummaryWriter(tmp_path) as writer:
            DensityMonitor(writer, model).log(7)
        events = EventAccumulator(str(tmp_path)).Reload()

        norms = (logits.double().sigmoid() - nn.functional.one_hot(labels, 5)[:, :4]).abs()
        region = (norms * 20).long().clamp(max=19).flatten()
        entries = torch.bincount(region, minlength=20).double()
        assert bool((entries > 0).all())
        weights = (entries.sum() / (20 * entries)) ** 0.25
        gradient = weights * entries * (torch.arange(20) + 0.5) / 20
        expected = {
            "strength": 0.25,
            "largest_weight": weights.max(),
            "share_of_entries/easy": entries[:2].sum() / entries.sum(),
            "share_of_entries/middle": entries[2:18].sum() / entries.sum(),
            "share_of_entries/hard": entries[18:].sum() / entries.sum(),
            "share_of_gradient/easy": gradient[:2].sum() / gradient.sum(),
            "share_of_gradient/middle": gradient[2:18].sum() / gradient.sum(),
            "share_of_gradient/hard": gradient[18:].sum() / gradient.sum(),
        }
        assert set(events.Tags()["scalars"]) == {f"ghm.head/{name}" for name in expected}
        for name, value in expected.items():
            (event,) = events.Scalars(f"ghm.head/{name}")
            assert event.step == 7
            assert event.value == pytest.approx(float(value), rel=1e-6)  # stored as float32
        bars = {
            "share_of_gradient": gradient / gradient.sum(),
            "weights": weights,
            "entries_log10": (1 + entries).log10(),
        }
        assert set(events.Tags()["histograms"]) == {f"ghm.head/{name}" for name in bars}
        for name, heights in bars.items():
            (event,) = events.Histograms(f"ghm.head/{name}")
            assert event.histogram_value.bucket == pytest.approx(heights.tolist(), rel=1e-6)
        assert events.Tags()["tensors"] == []  # no problems, so no text

    def test_tensorboard_draws_one_bar_a_region(self, tmp_path):
        """What it makes of the histogram when it loads it, which drops empty bars at the ends."""
        with SummaryWriter(tmp_path) as writer:
            DensityMonitor(writer, counted([0.0, 30.0, 0.0, 10.0, 0.0])).log(0)
        (path,) = tmp_path.iterdir()
        values = [v for event in EventFileLoader(str(path)).Load() for v in event.summary.value]
        (shares,) = [v for v in values if v.tag == "ghm/share_of_gradient"]
        # 40 / (2 * 30) and 40 / (2 * 10), to the power of 1 (the default of a density).
        gradient = torch.tensor([0.3 * 30 * (40 / 60), 0.0, 0.7 * 10 * (40 / 20)])
        expected = [
            (low, high, height)
            for low, high, height in zip(
                (0.2, 0.4, 0.6), (0.4, 0.6, 0.8), gradient / gradient.sum(), strict=True
            )
        ]
        drawn = tensor_util.make_ndarray(shares.tensor)
        assert drawn == pytest.approx(torch.tensor(expected).numpy(), rel=1e-6)  # float32

    def test_a_region_that_was_long_not_hit_is_not_loud(self):
        found = logged(counted([1e6, 100.0, 1e-3]))
        assert found.scalars["ghm/largest_weight"] == pytest.approx(1000100.001 / 200)
        assert found.bars["ghm/weights"][2] == 0
        forgotten = logged(counted([1e-3, 1e-4]))
        assert forgotten.scalars["ghm/largest_weight"] == 0
        assert "ghm/weights" not in forgotten.bars
        assert sum(forgotten.bars["ghm/share_of_gradient"]) == pytest.approx(1.0)

    def test_the_strength_is_the_schedules_of_now(self, recorder):
        schedule = StrengthSchedule(start=0.4, end=0.0, steps=10)
        DensityMonitor(recorder, counted([5.0, 5.0], updates=5, strength=schedule)).log(3)
        assert recorder.scalars["ghm/strength"] == pytest.approx(0.2)

    @pytest.mark.parametrize("density", ["unit_region", "exact"])
    def test_what_has_no_regions_yet_shows_its_strength(self, density):
        criterion = GHMCLoss(density=density)
        if density == "exact":
            criterion(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
        assert logged(criterion).scalars == {"ghm/strength": 0.25}
        assert logged(criterion).bars == {}

    @pytest.mark.parametrize("density", ["unit_region", "streaming"])
    def test_a_batch_of_ignored_entries_alone_counts_nothing(self, density):
        criterion = GHMCLoss(density=density)
        criterion(torch.zeros(4, 2), torch.full((4,), -1))
        assert logged(criterion).bars == {}

    def test_a_problem_is_told_once_and_of_every_density(self, tmp_path):
        losses = {"a": counted([1e9, 1.0, 1.0, 1.0]), "b": counted([1e9, 1.0, 1.0, 1.0])}
        with SummaryWriter(tmp_path) as writer:
            monitor = DensityMonitor(writer, losses)
            monitor.log(1, problems=False)
            monitor.log(2)
            monitor.log(3)
        events = EventAccumulator(str(tmp_path)).Reload()
        for name, density in losses.items():
            told = events.Tensors(f"ghm.{name}/problems/text_summary")
            assert [event.step for event in told] == [2, 2]
            text = [event.tensor_proto.string_val[0].decode() for event in told]
            assert text == density.problems()
            assert "too thin" in text[0]
            assert "explode" in text[1]

    def test_what_is_watched_may_be_a_model_a_loss_or_losses_by_name(self):
        classify, regress = GHMCLoss(), GHMRLoss()
        assert find_densities(classify) == {"": classify.density}
        both = {"cls": classify, "reg": regress, "again": classify}
        assert find_densities(both) == {"cls": classify.density, "reg": regress.density}
        model = nn.Module()
        model.head = nn.Module()
        model.head.loss = classify
        wrapped = nn.Module()
        wrapped.module = model
        assert find_densities(wrapped) == {"head": classify.density}
        model.head.density = regress.density  # two of the same short name
        assert find_densities(wrapped) == {
            "head": classify.density,
            "module.head.density": regress.density,
        }

    def test_a_model_without_density_is_refused(self, recorder):
        with pytest.raises(ValueError, match=r"no GradientDensity in torch\.nn\..*Linear"):
            DensityMonitor(recorder, nn.Linear(2, 2))

    @pytest.mark.parametrize("watched", [[GHMCLoss()], {"classify": "loss"}, None])
    def test_what_is_no_module_is_refused(self, recorder, watched):
        with pytest.raises(TypeError, match=r"a module, or modules by name, got builtins\."):
            DensityMonitor(recorder, watched)


class TestSharesByBand:
    @pytest.mark.parametrize(
        ("amounts", "shares"),
        [
            ([1.0], (0.1, 0.8, 0.1)),
            ([3.0, 0.0, 0.0, 0.0, 1.0], (0.375, 0.5, 0.125)),  # half of the outer regions each
            ([8.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0], (0.8, 0.1, 0.1)),
        ],
    )
    def test_a_region_is_split_where_a_band_ends(self, amounts, shares):
        found = shares_by_band(torch.tensor(amounts, dtype=torch.float64))
        # Float64, and edges such as 0.1 that are none of its numbers.
        assert tuple(found.values()) == pytest.approx(shares, rel=1e-12, abs=1e-15)
        assert list(found) == ["easy", "middle", "hard"]

    @pytest.mark.parametrize("regions", [7, 30, 990])
    def test_they_sum_to_one(self, regions):
        amounts = torch.rand(regions, dtype=torch.float64)
        assert sum(shares_by_band(amounts).values()) == pytest.approx(1.0, rel=1e-12)


class TestPositivesMonitor:
    def test_shares_are_of_what_was_counted_since_the_last_time(self, recorder):
        monitor = PositivesMonitor(recorder, ("cat", "dog", "owl"))
        monitor.count(torch.tensor([[0, 3, 3, -1], [2, 3, 0, -7]]))
        monitor.count(torch.tensor([0, 3, 3, 3], dtype=torch.int32))
        monitor.log(4)
        assert recorder.scalars == {
            "positives/foreground": 4 / 10,
            "positives/cat": 3 / 4,
            "positives/dog": 0.0,  # a class that never came is there to be missed
            "positives/owl": 1 / 4,
        }
        monitor.count(torch.tensor([1, 3]))
        monitor.log(5)
        assert recorder.scalars["positives/dog"] == 1.0

    def test_nothing_counted_is_nothing_written(self, recorder):
        monitor = PositivesMonitor(recorder, ("cat",), tag="seen")
        monitor.log(0)
        monitor.count(torch.tensor([-1, -1]))
        monitor.log(1)
        assert recorder.scalars == {}
        monitor.count(torch.tensor([1, 1]))
        monitor.log(2)
        assert recorder.scalars == {"seen/foreground": 0.0}  # of no positives there are no shares

    def test_counting_waits_for_no_device(self, recorder):
        """On the meta device there is nothing to wait for: whoever reads a value fails."""
        monitor = PositivesMonitor(recorder, ("cat", "dog"))
        monitor.count(torch.zeros(5, dtype=torch.int64, device="meta"))
        with pytest.raises(NotImplementedError):
            monitor.log(0)

    def test_a_label_above_background_is_refused_when_it_is_read(self, recorder):
        monitor = PositivesMonitor(recorder, ("cat", "dog"))
        monitor.count(torch.tensor([0, 1, 2, 3, 91]))
        with pytest.raises(ValueError, match="2 labels were above 2, which is background"):
            monitor.log(0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
    def test_targets_that_are_no_indices_are_refused(self, recorder, dtype):
        with pytest.raises(TypeError, match=f"class indices, got {dtype}"):
            PositivesMonitor(recorder, ("cat",)).count(torch.zeros(4, dtype=dtype))

    def test_counts_and_classes_must_agree(self, recorder):
        with pytest.raises(ValueError, match=r"\[3\], got \[2\]"):
            PositivesMonitor(recorder, ("cat", "dog")).log_counts(torch.zeros(2), 0)
        with pytest.raises(ValueError, match="class_names is empty"):
            PositivesMonitor(recorder, ())


def test_every_number_is_finite(recorder):
    criterion = GHMRLoss(density="streaming")
    criterion(torch.randn(50, 4), torch.zeros(50, 4))
    DensityMonitor(recorder, criterion).log(0)
    assert len(recorder.bars) == 3
    numbers = [*recorder.scalars.values(), *(x for bars in recorder.bars.values() for x in bars)]
    assert all(math.isfinite(number) for number in numbers)
