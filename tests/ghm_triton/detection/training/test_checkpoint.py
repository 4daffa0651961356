import os

import pytest
import torch

from ghm_triton.detection.training.checkpoint import Checkpoint, CheckpointError, sha256_of
from ghm_triton.detection.training.loop import train


def test_what_is_saved_comes_back(trained, tmp_path):
    first = Checkpoint.load(trained)
    first.save(tmp_path / "again.pt")
    second = Checkpoint.load(tmp_path / "again.pt")
    assert second.config == first.config
    assert second.training == first.training
    assert second.statistics.to_dict() == first.statistics.to_dict()
    assert all(torch.equal(first.model[k], second.model[k]) for k in first.model)


def test_the_detector_computes_what_was_trained(trained):
    detector = Checkpoint.load(trained).detector()
    assert not detector.training
    weights = Checkpoint.load(trained).model
    assert torch.equal(
        detector.state_dict()["backbone.stem.0.0.weight"].cpu(), weights["backbone.stem.0.0.weight"]
    )
    assert not any("loss" in key for key in detector.state_dict())


def first_key(model: dict[str, torch.Tensor]) -> str:
    return next(key for key in model if "loss" not in key)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda model, key: model.pop(key), "{key!r} is missing"),
        (lambda model, key: model.update({key: torch.zeros(3, 7)}), "{key!r} is [3, 7], not [{n}"),
        (lambda model, key: model.update({key: 0.5}), "{key!r} is float, not a tensor"),
        (lambda model, _: model.update({"head.more": torch.zeros(1)}), "'head.more' has no place"),
    ],
    ids=["missing", "of another shape", "no tensor", "unknown"],
)
def test_weights_that_do_not_fit_are_refused_by_name(trained, tmp_path, spoil, said):
    saved = Checkpoint.load(trained)
    key = first_key(saved.model)
    size = len(saved.model[key])
    spoil(saved.model, key)
    saved.save(tmp_path / "spoilt.pt")
    with pytest.raises(CheckpointError, match="do not fit a retinanet detector") as caught:
        Checkpoint.load(tmp_path / "spoilt.pt").detector()
    assert said.format(key=key, n=size) in str(caught.value)
    assert "more" not in str(caught.value).replace("head.more", "")


def test_of_many_weights_that_do_not_fit_the_first_are_named(trained):
    saved = Checkpoint.load(trained)
    saved.model = {key: weight for key, weight in saved.model.items() if "loss" in key}
    wanted = len(Checkpoint.load(trained).detector().state_dict())
    with pytest.raises(CheckpointError, match=f"; and {wanted - 3} more$") as caught:
        saved.detector()
    assert str(caught.value).count("is missing") == 3


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_file_that_would_execute_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "ghm-triton checkpoint", "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="would execute code"):
        Checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_a_truncated_file_is_refused(trained, tmp_path, keep):
    (tmp_path / "cut.pt").write_bytes(trained.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut\.pt"):
        Checkpoint.load(tmp_path / "cut.pt")


def test_foreign_newer_and_missing_files_say_so(trained, tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of ghm-triton"):
        Checkpoint.load(tmp_path / "foreign.pt")
    content = torch.load(trained, weights_only=True)
    torch.save({**content, "format_version": 9}, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match="format_version 9; this package reads up to 1"):
        Checkpoint.load(tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        Checkpoint.load(tmp_path / "none.pt")


WRONG = {
    "no version": (lambda c: c.pop("format_version"), "format_version must be 1 or more, got None"),
    "version of text": (lambda c: c.update(format_version="1"), "format_version .* got '1'"),
    "no configuration": (lambda c: c.pop("config"), "config must be a dict, got None"),
    "list": (lambda c: c.update(config=[1]), r"config must be a dict, got \[1\]"),
    "backbone": (lambda c: c["config"].update(backbone="vgg"), "backbone must be .* got 'vgg'"),
    "size": (lambda c: c["config"].update(image_size=(10**9, 64)), r"got \(1000000000, 64\)"),
    "size of text": (lambda c: c["config"].update(image_size="64x64"), "image_size is '64x64'"),
    "class": (lambda c: c["config"].update(class_names=(1, "b")), "class_names.0 is 1"),
    "unknown": (lambda c: c["config"].update(surprise=1), "surprise is 1: Unexpected"),
    "no statistics": (lambda c: c.pop("statistics"), "statistics must be a dict"),
    "counts": (lambda c: c["statistics"].update(anchors="x"), "statistics cannot be used: anchors"),
    "weights of text": (lambda c: c.update(model="weights"), "model must be a dict, got 'weights'"),
}


@pytest.mark.parametrize(("spoil", "said"), WRONG.values(), ids=WRONG)
def test_wrong_content_is_refused_in_a_sentence_with_file_and_value(trained, tmp_path, spoil, said):
    content = torch.load(trained, weights_only=True)
    spoil(content)
    torch.save(content, tmp_path / "wrong.pt")
    with pytest.raises(CheckpointError, match=said) as caught:
        Checkpoint.load(tmp_path / "wrong.pt")
    assert str(caught.value).startswith(str(tmp_path / "wrong.pt"))
    assert "\n" not in str(caught.value)


def test_a_text_file_is_refused(tmp_path):
    (tmp_path / "notes.pt").write_text("no checkpoint\n" * 100)
    with pytest.raises(CheckpointError, match=r"notes\.pt is damaged, or holds more than weights"):
        Checkpoint.load(tmp_path / "notes.pt")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: c["resume"].pop("optimizer"), "cannot be resumed: 'optimizer' is missing"),
        (lambda c: c["training"].update(step="soon"), "training cannot be used: .*'soon'"),
        (lambda c: c["model"].clear(), "cannot be resumed: .*Missing key"),
    ],
    ids=["optimizer", "step", "weights"],
)
def test_a_run_does_not_resume_from_wrong_content(trained, options, config, tmp_path, spoil, said):
    content = torch.load(trained, weights_only=True)
    spoil(content)
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=rf"checkpoint\.pt:? {said}"):
        train(options, config, tmp_path, resume=True, device="cpu", progress=False)


def test_a_failed_save_keeps_the_old_file_and_leaves_no_litter(trained, tmp_path, monkeypatch):
    path = tmp_path / "kept.pt"
    saved = Checkpoint.load(trained)
    saved.save(path)
    before = sha256_of(path)

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        saved.save(path)
    assert sha256_of(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.pt"]
