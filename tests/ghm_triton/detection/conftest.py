"""A detector small enough to train inside a test, and one that has been trained."""

from pathlib import Path

import pytest

from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.detection.training.loop import train

DIGITS = tuple("0123456789")
DATA = "digits:images=64,held_out_images=12,size=96"


@pytest.fixture
def config() -> DetectorConfig:
    return DetectorConfig(class_names=DIGITS, image_size=(96, 96), channels=16, head_convs=1)


@pytest.fixture
def options() -> TrainOptions:
    return TrainOptions(data=DATA, steps=6, batch_size=4, warmup=2, checkpoint_every=3)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of a few steps."""
    out = tmp_path_factory.mktemp("trained")
    config = DetectorConfig(class_names=DIGITS, image_size=(96, 96), channels=16, head_convs=1)
    options = TrainOptions(data=DATA, steps=6, batch_size=4, warmup=2, checkpoint_every=3)
    return train(options, config, out, device="cpu", progress=False).checkpoint
