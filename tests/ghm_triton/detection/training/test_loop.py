import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ghm_triton.detection.data import open_dataset
from ghm_triton.detection.data.loader import StepSampler, TrainingView
from ghm_triton.detection.models.registry import build_detector
from ghm_triton.detection.training.checkpoint import CHECKPOINT, Checkpoint
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.detection.training.hooks import METRICS, TrainingError, keep_steps
from ghm_triton.detection.training.loop import train
from ghm_triton.diagnosis import DensityWarning


def losses_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def quietly(options, config, out, **kwargs):
    return train(options, config, out, device="cpu", progress=False, **kwargs)


def test_a_resumed_run_has_the_losses_of_an_unbroken_one(options, config, tmp_path):
    quietly(options, config, tmp_path / "whole")
    quietly(options, config, tmp_path / "broken", stop_after=4)
    quietly(options, config, tmp_path / "broken", resume=True)
    # Bit for bit: batches are a function of (seed, step) and all state is in the checkpoint.
    assert losses_of(tmp_path / "broken") == losses_of(tmp_path / "whole")
    whole, broken = (Checkpoint.load(tmp_path / x / CHECKPOINT) for x in ("whole", "broken"))
    assert whole.model.keys() == broken.model.keys()
    assert all(torch.equal(whole.model[key], broken.model[key]) for key in whole.model)
    assert whole.statistics.to_dict() == broken.statistics.to_dict()


@pytest.mark.parametrize("torn", ['{"ste', '{"step": 4, "classification": 0.', "\0\0"])
def test_a_line_that_a_killed_run_did_not_finish_is_dropped(torn, tmp_path):
    metrics = tmp_path / METRICS
    metrics.write_text("".join(f'{{"step": {n}}}\n' for n in range(5)) + torn)
    keep_steps(metrics, 4)
    assert [line["step"] for line in losses_of(tmp_path)] == [0, 1, 2, 3]
    assert metrics.read_text().endswith("\n")  # for the resumed run to go on from


@pytest.mark.parametrize("damaged", ['{"step": 1, "cls', '{"loss": 1.0}', "[]", ""])
def test_a_line_that_was_damaged_is_named(damaged, tmp_path):
    metrics = tmp_path / METRICS
    metrics.write_text(f'{{"step": 0}}\n{damaged}\n{{"step": 2}}\n')
    before = metrics.read_text()
    with pytest.raises(ValueError, match=rf"{METRICS}, line 2 is damaged: '.*Repair or remove"):
        keep_steps(metrics, 3)
    assert metrics.read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "chosen"),
    [
        ("retinanet", {"mining": "s-ohem", "cls_loss": "ce", "reg_loss": "iou", "init": "optimal"}),
        ("fcos", {"mining": "ohem", "reg_loss": "giou", "guided_loss": True, "init": "prior=0.02"}),
        ("faster-rcnn", {"mining": "s-ohem", "guided_loss": True, "init": "optimal"}),
        ("faster-rcnn", {"mining": "ohem", "guided_loss": True, "sampling": False}),
    ],
)
def test_mined_and_guided_runs_resume_bit_for_bit(chosen, architecture, options, config, tmp_path):
    config = dataclasses.replace(config, architecture=architecture)
    options = dataclasses.replace(options, steps=4, mining_keep=9, **chosen)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    quietly(options, config, whole)
    quietly(options, config, broken, stop_after=3)
    quietly(options, config, broken, resume=True)
    assert losses_of(broken) == losses_of(whole)
    saved = [Checkpoint.load(out / CHECKPOINT) for out in (whole, broken)]
    assert all(torch.equal(saved[0].model[key], saved[1].model[key]) for key in saved[0].model)
    if chosen["mining"] == "s-ohem":
        counts = [v for k, v in saved[0].model.items() if k.endswith("mining.choose.updates")]
        assert [int(count) for count in counts] == [options.steps]
    # What was learnt with is no part of what was learnt.
    assert not any("mining" in key for key in saved[0].detector().state_dict())


def test_a_checkpoint_of_before_the_methods_resumes(options, config, tmp_path):
    options = dataclasses.replace(options, guided_loss=False)
    quietly(options, config, tmp_path / "whole")
    quietly(options, config, tmp_path / "old", stop_after=4)
    saved = Checkpoint.load(tmp_path / "old" / CHECKPOINT)
    for name in ("mining", "mining_keep", "sampling", "init", "guided_loss"):
        del saved.training[name]
    saved.save(tmp_path / "old" / CHECKPOINT)
    assert TrainOptions.of_run(saved.training) == options.settled("retinanet")
    quietly(options, config, tmp_path / "old", resume=True)
    assert losses_of(tmp_path / "old") == losses_of(tmp_path / "whole")


def test_the_seed_decides_and_nothing_else(options, config, tmp_path):
    quietly(options, config, tmp_path / "a")
    torch.rand(7)  # the state a caller left behind must not matter
    quietly(options, config, tmp_path / "b")
    quietly(dataclasses.replace(options, seed=1), config, tmp_path / "c")
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
    assert losses_of(tmp_path / "a") != losses_of(tmp_path / "c")


def test_statistics_count_the_anchors_that_were_trained_on(options, config, tmp_path):
    quietly(options, config, tmp_path)
    detector = build_detector(config)
    dataset = open_dataset(options.data, "train")
    view = TrainingView(dataset, config, (0.0, 0.0))
    expected = torch.zeros(len(config.class_names) + 1, dtype=torch.int64)
    for draws in StepSampler(len(dataset), options.batch_size, options.seed, 0, options.steps):
        labels = detector.labels([view[draw][1] for draw in draws])
        expected += torch.bincount(labels[labels >= 0], minlength=len(expected))
    statistics = Checkpoint.load(tmp_path / CHECKPOINT).statistics
    assert statistics.anchors == int(expected.sum())
    assert statistics.positives.tolist() == expected[:-1].tolist()
    held_out = open_dataset(options.data, "val")
    boxes = sum(len(held_out[i].labels) for i in range(len(held_out)))
    assert int(statistics.ground_truths.sum()) == boxes


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        {"reg_loss": "asl1", "guided_loss": True, "init": "optimal"},
        {"reg_loss": "iou", "cls_loss": "ce", "mining": "s-ohem"},
        {"reg_loss": "giou", "cls_loss": "focal", "mining": "ohem"},
    ],
)
def test_every_method_learns(chosen, options, config, tmp_path):
    quietly(dataclasses.replace(options, steps=20, batch_size=8, **chosen), config, tmp_path)
    lines = losses_of(tmp_path)
    total = [x["classification"] + x["bbox_regression"] for x in lines]
    assert sum(total[-5:]) / 5 < 0.85 * sum(total[:2]) / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [{"mining": "s-ohem"}, {"mining": "ohem", "guided_loss": True, "init": "optimal"}],
)
def test_a_two_stage_detector_learns_by_them_too(chosen, options, config, tmp_path):
    config = dataclasses.replace(
        config, architecture="faster-rcnn", classifier="softmax", proposals=50
    )
    options = dataclasses.replace(options, cls_loss="ce", reg_loss="sl1", steps=20, **chosen)
    quietly(options, config, tmp_path)
    lines = losses_of(tmp_path)
    # A guided classification repeats the regression. Mined, a loss is that of the hardest.
    name = "unguided_classification" if "guided_loss" in chosen else "classification"
    first, last = ([x[name] for x in rows] for rows in (lines[:2], lines[-5:]))
    assert sum(last) / 5 < 0.8 * sum(first) / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls_loss", "reg_loss"), [("ghm", "ghm"), ("focal", "sl1"), ("ce", "ghm")]
)
def test_every_loss_learns(cls_loss, reg_loss, options, config, tmp_path):
    chosen = dataclasses.replace(
        options, cls_loss=cls_loss, reg_loss=reg_loss, steps=30, batch_size=8, strength_end=None
    )
    quietly(chosen, config, tmp_path)
    lines = losses_of(tmp_path)
    first, last = lines[0], lines[-5:]
    assert sum(x["classification"] for x in last) / 5 < 0.7 * first["classification"]


def test_mixed_precision_trains(options, config, tmp_path):
    quietly(dataclasses.replace(options, amp="bf16"), config, tmp_path)
    assert len(losses_of(tmp_path)) == options.steps


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_checkpoint(options, config, tmp_path):
    quietly(options, config, tmp_path, stop_after=3)
    sound = (tmp_path / CHECKPOINT).read_bytes()
    saved = Checkpoint.load(tmp_path / CHECKPOINT)
    saved.model["head.classification_head.cls_logits.bias"].fill_(float("nan"))
    saved.save(tmp_path / CHECKPOINT)
    poisoned = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(TrainingError, match=r"step 3: .*nan.*is not finite"):
        quietly(options, config, tmp_path, resume=True)
    assert (tmp_path / CHECKPOINT).read_bytes() == poisoned != sound


def test_resuming_with_other_options_is_refused_by_name(options, config, tmp_path):
    quietly(options, config, tmp_path, stop_after=3)
    with pytest.raises(ValueError, match=r"'lr': \(0\.\d+, 0\.5\)"):
        quietly(dataclasses.replace(options, lr=0.5), config, tmp_path, resume=True)
    wider = dataclasses.replace(config, channels=24)
    with pytest.raises(ValueError, match="another detector"):
        quietly(options, wider, tmp_path, resume=True)


def test_holding_out_what_is_trained_on_is_warned_of(options, config, tmp_path):
    leaking = dataclasses.replace(options, val_split="train", steps=1)
    with pytest.warns(UserWarning, match="64 of the 64 images of split 'train' are trained on too"):
        quietly(leaking, config, tmp_path)


@pytest.mark.slow
def test_a_density_that_does_not_suit_the_batches_is_warned_of_once(options, config, tmp_path):
    fine = dataclasses.replace(options, steps=40, batch_size=2, strength=1.0, bins=500)
    with pytest.warns(DensityWarning) as seen:
        quietly(fine, config, tmp_path)
    kinds = [str(warning.message).partition(":")[0] for warning in seen]
    assert "bins are too thin for the batch" in kinds
    assert len(set(kinds)) == len(kinds)


def test_a_mistaken_held_out_split_is_found_before_training(options, config, tmp_path):
    with pytest.raises(ValueError, match="unknown split 'vall'"):
        quietly(dataclasses.replace(options, val_split="vall"), config, tmp_path)
    assert not (tmp_path / METRICS).exists()


def test_asking_for_a_gpu_that_is_not_there_says_so(options, config, tmp_path):
    if torch.cuda.is_available():
        assert train(options, config, tmp_path, device="cuda", progress=False).held_out
        return
    with pytest.raises(ValueError, match="no CUDA device"):
        train(options, config, tmp_path, device="cuda", progress=False)


@pytest.mark.slow
def test_two_processes_train_as_one_and_share_the_density(tmp_path):
    """`torchrun` with two processes: one checkpoint, all anchors of the whole batch counted."""
    out = tmp_path / "two"
    arguments = "--data digits:images=32,held_out_images=4,size=96 --image-size 96x96 --channels 16"
    arguments += " --head-convs 1 --steps 4 --batch-size 4 --device cpu"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [*launch, "-m", "ghm_triton.cli", "train", "--out", str(out), *arguments.split()]
    command += ["--tensorboard"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)
    alone = tmp_path / "one"
    command = [sys.executable, "-m", "ghm_triton.cli", "train", "--out", str(alone)]
    subprocess.run([*command, *arguments.split()], check=True, timeout=240)
    together, single = Checkpoint.load(out / CHECKPOINT), Checkpoint.load(alone / CHECKPOINT)
    assert together.statistics.positives.tolist() == single.statistics.positives.tolist()
    assert together.statistics.anchors == single.statistics.anchors
    # One process writes, of the labels of both.
    (board,) = (out / "tensorboard").iterdir()
    (foreground,) = EventAccumulator(str(board)).Reload().Scalars("positives/foreground")
    share = int(single.statistics.positives.sum()) / single.statistics.anchors
    assert foreground.value == pytest.approx(share, rel=1e-6)  # float32
    # The first counts come from equal weights. Batch norm sees half the batch a process, so the
    # gradient norms differ a little; the number of valid entries does not.
    key = "head.classification_loss.loss.density.smoothed"
    assert together.model[key].sum() == pytest.approx(float(single.model[key].sum()), rel=1e-6)
