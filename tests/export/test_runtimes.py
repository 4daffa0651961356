from __future__ import annotations

import numpy as np
import onnx
import pytest

from export import runtimes
from export.card import IOU_INPUT, OUTPUTS, THRESHOLDS_INPUT
from export.file import read_detector
from export.runtimes import (
    RUNTIMES,
    MissingRuntimeError,
    OnnxRuntime,
    Reference,
    UnrunnableError,
    find_runtimes,
)

OTHERS = {THRESHOLDS_INPUT: np.array([0.6, 0.5, 0.55], np.float32)}
OTHER_NMS = {**OTHERS, IOU_INPUT: np.array([0.9], np.float32)}


@pytest.fixture(scope="module")
def loaded(detector_path):
    return [runtime(read_detector(detector_path)) for runtime in RUNTIMES]


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(2, 3, 64, 96)).astype(np.float32)


def test_all_answer_alike_with_and_without_overrides(loaded, images):
    counts = []
    # Back and forth: a runtime that bakes overrides in must take them out again.
    for overrides in ({}, OTHERS, OTHER_NMS, {}):
        first, *others = [runtime.run(images, overrides) for runtime in loaded]
        for answer in others:
            assert len(answer) == len(OUTPUTS)
            for ours, theirs in zip(first, answer, strict=True):
                assert ours.dtype == theirs.dtype
                # Rounding of three convolutions: thirty times what is seen, in pixels and scores.
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
        counts.append(int(first[3].sum()))
    assert len({*counts[:3]}) == 3
    assert counts[3] == counts[0]


def test_an_answer_outlives_the_next(loaded, images):
    for runtime in loaded:
        scores = runtime.run(images, OTHERS)[1]
        before = scores.copy()
        runtime.run(images[::-1].copy(), OTHERS)
        np.testing.assert_array_equal(scores, before)


@pytest.mark.parametrize("kind", RUNTIMES, ids=[runtime.name for runtime in RUNTIMES])
def test_what_does_not_load_or_run_is_told(kind, detector_path, images):
    file = read_detector(detector_path)
    with pytest.raises(UnrunnableError, match=f"{kind.name} fails on a batch of 2: "):
        kind(file).run(images[:, :, :, ::2].copy(), {})
    model = onnx.load_model_from_string(file.content)
    for node in model.graph.node:
        if node.op_type == "Sigmoid":
            node.op_type = "Sigmold"
    broken = type(file)(file.path, file.card, file.sha256, model.SerializeToString())
    with pytest.raises(UnrunnableError, match=f"{kind.name} (refuses the file|fails on)"):
        kind(broken).run(images, {})


def test_titles_name_versions():
    for runtime in RUNTIMES:
        name, number = runtime.title().split()
        assert name == runtime.name
        assert number[0].isdigit()


def test_runtimes_are_found_by_name():
    assert find_runtimes(["reference", "onnxruntime"]) == ([OnnxRuntime, Reference], {})
    assert find_runtimes(["all"]) == (list(RUNTIMES), {})


@pytest.fixture
def without_openvino(monkeypatch):
    real = runtimes.find_spec
    monkeypatch.setattr(
        runtimes, "find_spec", lambda name: None if name == "openvino" else real(name)
    )


@pytest.mark.usefixtures("without_openvino")
def test_a_missing_one_is_an_error_only_by_its_name():
    command = "pip install 'ghm-triton[openvino]'"
    assert find_runtimes(["all"]) == ([OnnxRuntime, Reference], {"openvino": command})
    message = r"openvino is not installed: pip install 'ghm-triton\[openvino\]'"
    for names in (["openvino"], ["all", "openvino"]):
        with pytest.raises(MissingRuntimeError, match=message):
            find_runtimes(names)


@pytest.mark.parametrize(("names", "said"), [(["tensorrt"], "'tensorrt'"), ([], "no runtime")])
def test_an_unknown_one_is_refused(names, said):
    with pytest.raises(ValueError, match=f"{said}.*known: onnxruntime, openvino, reference, all"):
        find_runtimes(names)
