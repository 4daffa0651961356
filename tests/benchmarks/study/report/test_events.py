import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.study.report.events import write_events
from benchmarks.study.report.runs import read_study
from ghm_triton.detection.training import telemetry


def curves(losses):
    return {
        "step": [10, 20],
        "classification": losses,
        "bbox_regression": [0.5, None],
        "grad_norm": [4.0, 3.0],
    }


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_every_run_with_curves_has_its_own(write, make, tmp_path):
    guided = {**curves([2.0, 1.0]), "unguided_classification": [9.0, 8.0]}
    rows = [make("ghm", 1, curves=guided), make("ce"), make(curves=curves([3.0, 3.0]))]
    assert write_events(read_study([write(*rows)]), tmp_path / "events") == 2
    setting = "digits_retinanet_600_steps_batch_16_128x128_pixels_48_channels"
    home = tmp_path / "events" / "methods" / setting
    assert sorted(path.name for path in home.iterdir()) == ["focal", "ghm"]
    assert scalars(home / "ghm" / "seed_1") == {
        "loss/classification": [(10, 2.0), (20, 1.0)],
        "loss/unguided_classification": [(10, 9.0), (20, 8.0)],
        "loss/bbox_regression": [(10, 0.5)],
        "optimiser/grad_norm": [(10, 4.0), (20, 3.0)],
    }


def test_a_second_call_replaces_the_first(write, make, tmp_path):
    for losses in ([2.0, 1.0], [8.0, 4.0]):
        row = make("..", section="/", curves=curves(losses))
        write_events(read_study([write(row)]), tmp_path / "events")
    (seed,) = (tmp_path / "events").rglob("seed_0")
    assert len(seed.relative_to(tmp_path / "events").parts) == 4
    assert scalars(seed)["loss/classification"] == [(10, 8.0), (20, 4.0)]


def test_without_the_package_it_says_what_to_install(write, make, tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="tensorboard"):
        write_events(read_study([write(make())]), tmp_path)
