import json

import pytest
import torch
from PIL import Image

from ghm_triton.detection.data.coco import COCODataset
from ghm_triton.detection.data.problems import DamagedAnnotationError

# Ids neither contiguous nor in order: labels count them in the order of ids.
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


def annotation(**changes):
    return {"id": 1, "image_id": 10, "category_id": 3, "bbox": [1, 2, 8, 6], "iscrowd": 0} | changes


def image_entry(key, name, **changes):
    return {"id": key, "file_name": name, "width": 64, "height": 48} | changes


def write(root, annotations, images=None, categories=CATEGORIES, name="instances_train.json"):
    """A COCO folder of two images, ids 10 and 20, or of the given entries."""
    images = images or [image_entry(10, "a.png"), image_entry(20, "b.png")]
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "images").mkdir(exist_ok=True)
    for entry in ("a.png", "b.png"):
        Image.new("RGB", (64, 48), (90, 120, 150)).save(root / "images" / entry)
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / name).write_text(json.dumps(content))
    return root


def open_damaged(root):
    """Skips, and checks that refusing refuses the same."""
    dataset = COCODataset(root, "train")
    with pytest.raises(DamagedAnnotationError) as caught:
        COCODataset(root, "train", on_damage="refuse")
    assert caught.value.problems == tuple(dataset.problems)
    (problem,) = dataset.problems
    return dataset, problem


def test_reads_a_file(tmp_path):
    second = annotation(id=2, category_id=7, bbox=[10.5, 20.25, 30, 20], iscrowd=1)
    root = write(tmp_path / "pets", [annotation(), second])
    dataset = COCODataset(root, "train", on_damage="refuse")
    assert (len(dataset), dataset.name, dataset.split) == (2, "coco:pets", "train")
    assert dataset.class_names == ("cat", "dog")
    sample = dataset[0]
    assert (sample.image.mode, sample.image.size) == ("RGB", (64, 48))
    assert torch.equal(sample.boxes, torch.tensor([[1, 2, 9, 8], [10.5, 20.25, 40.5, 40.25]]))
    assert torch.equal(sample.labels, torch.tensor([0, 1]))
    assert torch.equal(sample.ignore, torch.tensor([False, True]))
    assert (sample.image_id, sample.source) == (10, "a.png")
    assert (dataset[1].image_id, dataset[1].boxes.shape) == (20, (0, 4))


def test_given_classes_set_the_order(tmp_path):
    root = write(tmp_path, [annotation(), annotation(id=2, category_id=7)])
    dataset = COCODataset(root, "train", class_names=["dog", "cat"])
    assert dataset[0].labels.tolist() == [1, 0]


def test_a_category_that_is_not_among_the_given(tmp_path):
    root = write(tmp_path, [annotation(id=5, category_id=7), annotation()])
    dataset = COCODataset(root, "train", class_names=["cat"])
    (problem,) = dataset.problems
    assert (problem.source, dataset[0].labels.tolist()) == ("a.png", [0])
    assert "annotation 5: unknown class 'dog'" in problem.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [5, 5, 0, 9]}, "has no area"),
        ({"bbox": [5, 5, 9, -2]}, "has no area"),
        ({"bbox": [float("nan"), 5, 9, 9]}, "is not finite"),
        ({"bbox": [5, 5, float("inf"), 9]}, "is not finite"),
        ({"bbox": [100, 5, 9, 9]}, "lies outside the 64x48 image"),
        ({"bbox": [5, 5, 9]}, "is not four numbers"),
        ({"bbox": [5, 5, 9, "9"]}, "is not four numbers"),
        ({"bbox": [5, 5, 9, 10**400]}, "is not four numbers"),
        ({"bbox": None}, "is not four numbers"),
        ({"category_id": 99}, "unknown class with category_id 99"),
        ({"category_id": None}, "unknown class with category_id None"),
        ({"category_id": [3]}, "unknown class with category_id [3]"),
    ],
)
def test_a_damaged_box_alone_is_dropped(tmp_path, changes, message):
    root = write(tmp_path, [annotation(id=5, **changes), annotation(id=6, category_id=7)])
    dataset, problem = open_damaged(root)
    assert problem.source == "a.png"
    assert problem.message.startswith("annotation 5: ")
    assert message in problem.message
    assert "box dropped" in problem.message
    assert dataset[0].labels.tolist() == [1]
    assert len(dataset) == 2


def test_an_overhanging_box_is_clipped_and_reported(tmp_path):
    dataset, problem = open_damaged(write(tmp_path, [annotation(bbox=[-5, 4, 20, 10])]))
    assert "box clipped" in problem.message
    assert dataset[0].boxes.tolist() == [[0, 4, 15, 14]]


@pytest.mark.parametrize("image_id", [99, None, "10", [10]])
def test_an_annotation_of_no_image(tmp_path, image_id):
    root = write(tmp_path, [annotation(id=5, image_id=image_id), annotation()])
    dataset, problem = open_damaged(root)
    assert problem.source == "annotations/instances_train.json"
    assert f"annotation 5: no image has id {image_id!r}" in problem.message
    assert len(dataset[0].boxes) == 1


def test_an_annotation_that_is_no_object(tmp_path):
    _, problem = open_damaged(write(tmp_path, [3, annotation()]))
    assert "annotation 3 is not an object" in problem.message


@pytest.mark.parametrize(
    ("entry", "source", "message"),
    [
        (image_entry(30, "gone.png"), "gone.png", "the image is missing"),
        (image_entry(30, "../a.png"), "../a.png", "leads out of the folder"),
        (image_entry(30, "b.png", width=640), "b.png", "says 640x48 pixels, the image has 64x48"),
        (image_entry(10, "b.png"), "b.png", "another image has id 10 too"),
        (image_entry("x", "b.png"), "annotations/instances_train.json", "integer id"),
        ({"id": 30}, "annotations/instances_train.json", "file_name"),
        ("b.png", "annotations/instances_train.json", "integer id"),
    ],
)
def test_a_damaged_image_is_dropped_with_its_boxes(tmp_path, entry, source, message):
    annotations = [annotation()]
    if isinstance(entry, dict) and entry["id"] == 30 and "file_name" in entry:
        annotations.append(annotation(id=2, image_id=30))  # not reported once more
    root = write(tmp_path, annotations, images=[image_entry(10, "a.png"), entry])
    dataset, problem = open_damaged(root)
    assert problem.source == source
    assert message in problem.message
    assert "image dropped" in problem.message
    assert [dataset[i].image_id for i in range(len(dataset))] == [10]


def test_not_an_image(tmp_path):
    root = write(tmp_path, [annotation()])
    (root / "images" / "b.png").write_text("no picture")
    _, problem = open_damaged(root)
    assert problem.source == "b.png"
    assert "cannot be read" in problem.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "has no list 'images'"),
        ('{"images": [], "categories": []}', "has no list 'annotations'"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1}]}',
            "needs an integer id and a name",
        ),
        (
            '{"images": [], "annotations": [],'
            ' "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
            "category 2 ('a') occurs twice",
        ),
    ],
)
def test_a_file_beyond_repair_is_refused_whatever_the_policy(tmp_path, content, message):
    root = write(tmp_path, [])
    (root / "annotations" / "instances_train.json").write_text(content)
    with pytest.raises(DamagedAnnotationError) as caught:
        COCODataset(root, "train", on_damage="skip")
    assert "annotations/instances_train.json" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("folder", ["images", "images/train", "train", "."])
def test_images_are_found(tmp_path, folder):
    root = write(tmp_path, [annotation()])
    target = root / folder / "deep" / "a.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    (root / "images" / "a.png").rename(target)
    write_again = {
        "images": [image_entry(10, "deep/a.png")],
        "annotations": [annotation()],
        "categories": CATEGORIES,
    }
    (root / "annotations" / "instances_train.json").write_text(json.dumps(write_again))
    assert COCODataset(root, "train", on_damage="refuse")[0].image.size == (64, 48)


@pytest.mark.parametrize("name", ["train.json", "instances_train.json", "instances_train2017.json"])
def test_annotations_are_found(tmp_path, name):
    root = write(tmp_path, [annotation()], name=name)
    write(tmp_path, [], name="captions_train.json")
    assert len(COCODataset(root, "train")[0].boxes) == 1


def test_instances_wins_over_a_bare_name(tmp_path):
    root = write(tmp_path, [annotation()], name="instances_a.json")
    write(tmp_path, [], name="a.json")
    assert len(COCODataset(root, "a")[0].boxes) == 1


def test_two_years_are_not_guessed_between(tmp_path):
    for year in (2014, 2017):
        root = write(tmp_path, [annotation()], name=f"instances_train{year}.json")
    with pytest.raises(ValueError, match="'train'; available: train2014, train2017"):
        COCODataset(root, "train")


def test_annotations_of_other_tasks_are_no_splits(tmp_path):
    root = write(tmp_path, [annotation()])
    write(tmp_path, [], name="captions_train.json")
    with pytest.raises(ValueError, match=r"'test'; available: train$"):
        COCODataset(root, "test")


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        COCODataset(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match=r"annotations.*is missing"):
        COCODataset(tmp_path, "train")
