import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from ghm_triton.cli import main
from ghm_triton.detection.training.checkpoint import CHECKPOINT, Checkpoint
from ghm_triton.detection.training.hooks import METRICS, TrainingError
from ghm_triton.detection.training.loop import train

SMALL = "--data digits:images=32,held_out_images=4,size=96 --image-size 96x96 --channels 16"
SMALL += " --head-convs 1 --steps 2 --batch-size 4 --device cpu"


def boarded(options, config, out, **kwargs):
    """A run that writes to a folder beside its own."""
    folder = out / "board"
    return train(
        options, config, out, device="cpu", progress=False, tensorboard=folder, **kwargs
    ), read(folder)


def read(folder):
    """Tag to `(step, value)` of every scalar that TensorBoard would show."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def float32(number):
    return float(torch.tensor(number, dtype=torch.float32))


@pytest.fixture(autouse=True)
def numbered_from_one(monkeypatch):
    """Event files of one second and process are read in the order of their names: 10 before 9."""
    counter = event_file_writer.AtomicCounter(0)
    monkeypatch.setattr(event_file_writer, "_global_uid", counter)


@pytest.fixture
def short(options):
    """Two looks: after step 19, and at the end."""
    return dataclasses.replace(options, steps=22, checkpoint_every=7)


def test_a_run_is_shown_as_it_was(short, config, tmp_path):
    result, shown = boarded(short, config, tmp_path)
    records = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    losses = ("classification", "bbox_regression")
    for name in losses:
        assert shown[f"loss/{name}"] == [(x["step"], float32(x[name])) for x in records]
    totals = [(x["step"], float32(sum(x[name] for name in losses))) for x in records]
    assert shown["loss/total"] == totals
    for name in ("lr", "grad_norm"):
        assert shown[f"optimiser/{name}"] == [(x["step"], float32(x[name])) for x in records]
    took = [
        (step, float32(1000 * s)) for step, s in zip((19, 21), result.step_seconds, strict=True)
    ]
    assert shown["optimiser/step_ms"] == took
    for name in ("classification_loss", "regression_loss"):
        easy, middle, hard = (
            shown[f"ghm.head.{name}/share_of_gradient/{band}"]
            for band in ("easy", "middle", "hard")
        )
        assert [step for step, _ in easy] == [19, 21]
        sums = [sum(value for _, value in bands) for bands in zip(easy, middle, hard, strict=True)]
        assert sums == pytest.approx([1.0, 1.0], rel=1e-6)  # float32
    held_out = result.held_out
    scores = {"": {"AP": held_out.ap, "AP50": held_out.ap50, "AP75": held_out.ap75}}
    scores["_AP"] = {name: ap for name, (ap, _) in held_out.per_class.items()}
    scores["_AP50"] = {name: ap50 for name, (_, ap50) in held_out.per_class.items()}
    missing = sum(np.isnan(ap) for ap in scores["_AP"].values())
    assert missing < len(config.class_names)
    for kind, names in scores.items():
        for name, value in names.items():
            expected = None if np.isnan(value) else [(22, float32(value))]
            assert shown.get(f"held_out{kind}/{name}") == expected


@pytest.mark.slow
def test_positives_are_those_of_the_steps_since_the_last_look(short, config, tmp_path):
    """Checkpoints come in between; a run that ends after 20 steps has counted the first look."""
    _, shown = boarded(short, config, tmp_path / "whole")
    boarded(short, config, tmp_path / "part", stop_after=20)
    whole, part = (
        Checkpoint.load(tmp_path / name / CHECKPOINT).statistics for name in ("whole", "part")
    )
    looks = [
        (19, part.anchors, part.positives),
        (21, whole.anchors - part.anchors, whole.positives - part.positives),
    ]
    shares = [(step, float32(int(n.sum()) / anchors)) for step, anchors, n in looks]
    assert shown["positives/foreground"] == shares
    for place, name in enumerate(config.class_names):
        shares = [(step, float32(int(n[place]) / int(n.sum()))) for step, _, n in looks]
        assert shown[f"positives/{name}"] == shares


@pytest.mark.slow
def test_steps_that_a_resumed_run_makes_again_are_shown_once(short, config, tmp_path):
    """As after a crash: the folder holds steps that the checkpoint knows nothing of."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _, expected = boarded(short, config, whole)
    boarded(short, config, broken, stop_after=20)
    shutil.copy(broken / CHECKPOINT, tmp_path / "saved.pt")
    boarded(short, config, broken, resume=True)
    shutil.copy(tmp_path / "saved.pt", broken / CHECKPOINT)
    _, shown = boarded(short, config, broken, resume=True)
    del expected["optimiser/step_ms"], shown["optimiser/step_ms"]
    assert shown == expected
    assert len(list((broken / "board").iterdir())) == 3


def test_a_new_run_in_an_old_folder_hides_the_old_one(options, config, tmp_path):
    _, old = boarded(options, config, tmp_path)
    focal = dataclasses.replace(options, steps=4, cls_loss="focal", reg_loss="sl1")
    _, shown = boarded(focal, config, tmp_path)
    assert [step for step, _ in old["loss/total"]] == list(range(6))
    assert [step for step, _ in shown["loss/total"]] == list(range(4))
    # Losses without a density have none to show, and positives all the same.
    assert not any(tag.startswith("ghm") and values for tag, values in shown.items())
    assert [step for step, _ in shown["positives/foreground"]] == [3]


def test_a_run_that_fails_leaves_its_curves(options, config, tmp_path):
    boarded(options, config, tmp_path, stop_after=3)
    saved = Checkpoint.load(tmp_path / CHECKPOINT)
    saved.model["head.classification_head.cls_logits.bias"].fill_(float("nan"))
    saved.save(tmp_path / CHECKPOINT)
    with pytest.raises(TrainingError):
        boarded(options, config, tmp_path, resume=True)
    assert [step for step, _ in read(tmp_path / "board")["loss/total"]] == list(range(6))


def test_without_tensorboard_the_extra_is_named_before_anything_is_lost(
    options, config, tmp_path, monkeypatch, capsys
):
    (tmp_path / METRICS).write_text("of an earlier run")
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not there
    with pytest.raises(ValueError, match=r"pip install 'ghm-triton\[tensorboard\]'"):
        boarded(options, config, tmp_path)
    assert (tmp_path / METRICS).read_text() == "of an earlier run"
    assert main(["train", "--out", str(tmp_path), *SMALL.split(), "--tensorboard"]) == 2
    assert "TensorBoard is not installed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "folder"), [([], None), (["--tensorboard"], "out/tensorboard"), (..., "elsewhere")]
)
def test_the_flag_says_where(given, folder, tmp_path, capsys):
    flags = ["--tensorboard", str(tmp_path / "elsewhere")] if given is ... else given
    assert main(["train", "--out", str(tmp_path / "out"), *SMALL.split(), *flags]) == 0
    written = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    assert written == ({tmp_path / folder} if folder else set())
