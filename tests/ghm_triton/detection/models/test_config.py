import dataclasses

import pytest

from ghm_triton.detection.models.config import DetectorConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_names", ("a", "a")),
        ("class_names", ()),
        ("backbone", "vgg"),
        ("image_size", (100, 96)),
        ("prior", 1.0),
        ("head_convs", 0),
        ("channels", 12),
        ("iou_threshold", 1.5),
        ("architecture", "yolo"),
        ("classifier", "argmax"),
        ("classifier", "softmax"),
        ("candidates", 0),
        ("max_detections", 0),
        ("proposals", 0),
        ("region_samples", -1),
        ("assigner", "hungarian"),
    ],
)
def test_a_configuration_names_what_is_wrong(field, value, config):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(config, **{field: value})


def test_a_configuration_survives_plain_values(config):
    assert DetectorConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="colour"):
        DetectorConfig.from_dict({**config.to_dict(), "colour": 1})


def test_a_configuration_without_an_architecture_is_a_retinanets(config):
    """As the first checkpoints wrote them."""
    values = config.to_dict()
    for name in ("architecture", "classifier", "proposals", "region_samples", "assigner"):
        del values[name]
    assert DetectorConfig.from_dict(values) == config
    assert config.architecture == "retinanet"


def test_points_are_not_assigned_by_the_overlap_of_anchors(config):
    with pytest.raises(ValueError, match=r"assigner must be iou for fcos, which has no anchors"):
        dataclasses.replace(config, architecture="fcos", assigner="cleanliness")
