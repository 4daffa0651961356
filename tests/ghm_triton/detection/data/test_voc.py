import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ghm_triton.detection.data.problems import DamagedAnnotationError
from ghm_triton.detection.data.voc import VOCDataset


def obj(name="cat", box=(1, 1, 10, 10), difficult=0):
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    inside = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners)
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<bndbox>{inside}</bndbox></object>"
    )


class Folder:
    """A Pascal VOC folder that a test fills."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (root / name).mkdir(parents=True)

    def image(self, stem, size=(64, 48), suffix=".jpg", **options):
        grey = zlib.crc32(stem.encode()) % 200
        picture = Image.new("RGB", size, (grey, grey, grey))
        picture.save(self.root / "JPEGImages" / f"{stem}{suffix}", **options)

    def xml(self, stem, text):
        (self.root / "Annotations" / f"{stem}.xml").write_text(text, encoding="utf-8")

    def add(self, stem, *objects, size=(64, 48)):
        self.image(stem, size)
        width, height = size
        self.xml(
            stem,
            f"<annotation><size><width>{width}</width><height>{height}</height></size>"
            f"{''.join(objects)}</annotation>",
        )

    def split(self, name, *stems):
        text = "".join(f"{stem}\n" for stem in stems)
        (self.root / "ImageSets" / "Main" / f"{name}.txt").write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """One good image, `ok`; tests add another and list it as the split `train`."""
    folder = Folder(tmp_path / "pets")
    folder.add("ok", obj("cat"), obj("dog"))
    return folder


def open_with(folder, stem):
    """The split of `ok` and a damaged image, skipping; and checks that refusing refuses."""
    folder.split("train", "ok", stem)
    dataset = VOCDataset(folder.root, "train", class_names=["cat", "dog"])
    with pytest.raises(DamagedAnnotationError) as caught:
        VOCDataset(folder.root, "train", class_names=["cat", "dog"], on_damage="refuse")
    assert caught.value.problems == tuple(dataset.problems)
    assert dataset[0].source == "JPEGImages/ok.jpg"
    assert len(dataset[0].boxes) == 2
    return dataset


def only_problem(dataset):
    (problem,) = dataset.problems
    return problem


def test_reads_a_folder(folder):
    folder.add("b", obj("dog", (2, 3, 20, 30)), obj("cat", (1, 1, 64, 48), difficult=1))
    folder.split("train", "ok", "b")
    dataset = VOCDataset(folder.root, "train")
    assert (len(dataset), dataset.name, dataset.split) == (2, "voc:pets", "train")
    assert dataset.class_names == ("cat", "dog")
    assert dataset.problems == []
    sample = dataset[1]
    assert (sample.image.mode, sample.image.size) == ("RGB", (64, 48))
    # 1-based, inclusive: the box over every pixel is the whole image.
    assert torch.equal(sample.boxes, torch.tensor([[1.0, 2, 20, 30], [0, 0, 64, 48]]))
    assert torch.equal(sample.labels, torch.tensor([1, 0]))
    assert torch.equal(sample.ignore, torch.tensor([False, True]))
    assert (sample.image_id, sample.source) == (1, "JPEGImages/b.jpg")
    assert sample.boxes.dtype == torch.float32


def test_an_image_without_objects_is_kept(folder):
    folder.add("empty")
    folder.split("train", "ok", "empty")
    sample = VOCDataset(folder.root, "train")[1]
    assert sample.boxes.shape == (0, 4)
    assert sample.labels.shape == sample.ignore.shape == (0,)
    assert (sample.labels.dtype, sample.ignore.dtype) == (torch.int64, torch.bool)


def test_classes_are_those_of_training_whatever_the_split(folder):
    folder.add("b", obj("axolotl"))
    folder.split("trainval", "ok")
    folder.split("test", "b")
    dataset = VOCDataset(folder.root, "test")
    assert dataset.class_names == ("cat", "dog")
    assert only_problem(dataset).source == "Annotations/b.xml"
    assert "unknown class 'axolotl'" in only_problem(dataset).message


def test_classes_without_a_training_list_are_those_of_the_folder(folder):
    folder.add("b", obj("axolotl"))
    folder.split("test", "b")
    assert VOCDataset(folder.root, "test").class_names == ("axolotl", "cat", "dog")


def test_given_classes_set_the_order(folder):
    folder.split("train", "ok")
    dataset = VOCDataset(folder.root, "train", class_names=["dog", "cat"])
    assert dataset.class_names == ("dog", "cat")
    assert dataset[0].labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (obj("cat", (5, 5, 5, 5)), "cat: box (5, 5, 5, 5) has no area"),
        (obj("cat", (9, 5, 5, 9)), "box (9, 5, 5, 9) has no area"),
        (obj("cat", ("nan", 5, 9, 9)), "is not finite"),
        (obj("cat", (1, 1, "inf", 9)), "is not finite"),
        (obj("cat", (200, 5, 210, 9)), "lies outside the 64x48 image"),
        (obj("cat", (5, "left", 9, 9)), "ymin is 'left', not a number"),
        (obj("cat", (5, 5, "", 9)), "bndbox without xmax"),
        (obj("horse"), "unknown class 'horse'"),
        (obj(""), "object without a name"),
        ("<object><name>cat</name></object>", "object without a bndbox"),
    ],
)
def test_a_damaged_box_alone_is_dropped(folder, damaged, message):
    folder.add("bad", obj("dog", (1, 1, 30, 40)), damaged)
    dataset = open_with(folder, "bad")
    assert only_problem(dataset).source == "Annotations/bad.xml"
    assert message in only_problem(dataset).message
    assert "box dropped" in only_problem(dataset).message
    assert len(dataset) == 2
    assert dataset[1].boxes.tolist() == [[0, 0, 30, 40]]
    assert dataset[1].labels.tolist() == [1]
    assert len(dataset[1].ignore) == 1


def test_an_overhanging_box_is_clipped_and_reported(folder):
    folder.add("bad", obj("cat", (10, 10, 80, 20)))
    dataset = open_with(folder, "bad")
    assert "box clipped" in only_problem(dataset).message
    assert dataset[1].boxes.tolist() == [[9, 9, 64, 20]]


def expect_image_dropped(folder, message):
    dataset = open_with(folder, "bad")
    assert only_problem(dataset).source == "Annotations/bad.xml"
    assert message in only_problem(dataset).message
    assert "image dropped" in only_problem(dataset).message
    assert len(dataset) == 1


def test_missing_image(folder):
    folder.add("bad", obj())
    (folder.root / "JPEGImages" / "bad.jpg").unlink()
    expect_image_dropped(folder, "JPEGImages/bad.jpg is missing")


def test_not_an_image(folder):
    folder.add("bad", obj())
    (folder.root / "JPEGImages" / "bad.jpg").write_text("no picture")
    expect_image_dropped(folder, "cannot be read")


def cut_short(folder):
    folder.add("bad", obj())
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    path = folder.root / "JPEGImages" / "bad.jpg"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_image_cut_short(folder):
    cut_short(folder)
    expect_image_dropped(folder, "cannot be read")


def test_image_cut_short_and_not_verified_is_named_when_read(folder):
    cut_short(folder)
    folder.split("train", "ok", "bad")
    dataset = VOCDataset(folder.root, "train", verify_images=False)
    assert len(dataset) == 2
    with pytest.raises(DamagedAnnotationError, match=r"JPEGImages/bad.jpg: cannot be decoded"):
        dataset[1]


def test_image_of_a_mode_without_a_white(folder):
    folder.add("bad", obj())
    (folder.root / "JPEGImages" / "bad.jpg").unlink()
    Image.new("F", (64, 48)).save(folder.root / "JPEGImages" / "bad.tif")
    expect_image_dropped(folder, "mode F is not read")


def test_another_size_than_declared(folder):
    folder.add("bad", obj())
    folder.image("bad", size=(32, 24))
    expect_image_dropped(folder, "says 64x48 pixels, the image has 32x24")


def test_missing_annotation(folder):
    folder.image("bad")
    expect_image_dropped(folder, "cannot be read (No such file")


@pytest.mark.parametrize("text", ["<annotation><object>", "", "{}", "<a></b>"])
def test_xml_that_does_not_parse(folder, text):
    folder.image("bad")
    folder.xml("bad", text)
    expect_image_dropped(folder, "is not well-formed XML")


def test_entity_bomb_is_refused(folder):
    folder.image("bad")
    lines = ['<!ENTITY a0 "ha">']
    lines += [f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 30)]
    bomb = f"<!DOCTYPE annotation [{''.join(lines)}]><annotation>&a29;</annotation>"
    folder.xml("bad", bomb)
    expect_image_dropped(folder, "declares a document type")


def test_external_entity_is_refused(folder, tmp_path):
    (tmp_path / "secret").write_text("cat")
    folder.image("bad")
    uri = (tmp_path / "secret").as_uri()
    folder.xml(
        "bad", f'<!DOCTYPE a [<!ENTITY x SYSTEM "{uri}">]><annotation><name>&x;</name></annotation>'
    )
    expect_image_dropped(folder, "declares a document type")


def test_a_name_that_leads_out_of_the_folder(folder):
    folder.split("train", "ok", "../../outside")
    problem = only_problem(VOCDataset(folder.root, "train"))
    assert "leads out of the folder" in problem.message


def test_listed_twice(folder):
    folder.split("train", "ok", "ok")
    dataset = VOCDataset(folder.root, "train")
    assert len(dataset) == 1
    assert "listed twice" in only_problem(dataset).message


def test_ids_stay_when_an_image_is_dropped(folder):
    folder.add("z", obj())
    folder.split("train", "ok", "nothing", "z")
    dataset = VOCDataset(folder.root, "train")
    assert [dataset[i].image_id for i in range(2)] == [0, 2]


def test_nothing_left(folder):
    folder.split("train", "nothing")
    with pytest.raises(DamagedAnnotationError, match="no usable image is left") as caught:
        VOCDataset(folder.root, "train", class_names=["cat"])
    assert "Annotations/nothing.xml" in str(caught.value)


def test_unknown_split_lists_the_lists(folder):
    for name in ("train", "val", "cat_train"):
        folder.split(name, "ok")
    with pytest.raises(ValueError, match=r"unknown split 'test'; available: train, val$"):
        VOCDataset(folder.root, "test")


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        VOCDataset(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match=r"Main.*is missing"):
        VOCDataset(tmp_path, "train")


def test_class_names_are_checked(folder):
    folder.split("train", "ok")
    with pytest.raises(ValueError, match="names cat more than once"):
        VOCDataset(folder.root, "train", class_names=["cat", "dog", "cat"])
    with pytest.raises(TypeError, match="'cat'"):
        VOCDataset(folder.root, "train", class_names="cat")
    with pytest.raises(ValueError, match="no classes"):
        VOCDataset(folder.root, "train", class_names=[])


def save_turned(folder, size, declared, orientation=6):
    """An image whose EXIF says to turn it; its top left quarter, as stored, is white."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), (0, 0, size[0] // 2, size[1] // 2))
    folder.add("turned", obj(box=(1, 1, 10, 10)), size=declared)
    picture.save(folder.root / "JPEGImages" / "turned.jpg", exif=exif, quality=95)
    folder.split("train", "turned")
    return VOCDataset(folder.root, "train")[0].image


def test_exif_turns_the_image_when_the_annotation_agrees(folder):
    image = save_turned(folder, (64, 32), declared=(32, 64))
    assert image.size == (32, 64)
    # Orientation 6 is a quarter turn clockwise: top left comes to lie top right.
    assert image.getpixel((28, 5))[0] > 200
    assert image.getpixel((4, 5))[0] < 50


def test_exif_is_left_alone_when_the_annotation_was_made_without_it(folder):
    image = save_turned(folder, (64, 32), declared=(64, 32))
    assert image.size == (64, 32)
    assert image.getpixel((5, 5))[0] > 200


def test_exif_half_a_turn(folder):
    image = save_turned(folder, (64, 32), declared=(64, 32), orientation=3)
    assert image.getpixel((60, 28))[0] > 200


@pytest.mark.bccd
@pytest.mark.skipif("BCCD_ROOT" not in os.environ, reason="BCCD_ROOT is not set")
def test_bccd():
    root = os.environ["BCCD_ROOT"]
    opened = {split: VOCDataset(root, split) for split in ("train", "val", "test")}
    assert sum(map(len, opened.values())) == 364
    for dataset in opened.values():
        assert dataset.class_names == ("Platelets", "RBC", "WBC")
    problems = [problem for dataset in opened.values() for problem in dataset.problems]
    assert sorted(problem.source for problem in problems) == [
        "Annotations/BloodImage_00338.xml",
        "Annotations/BloodImage_00343.xml",
    ]
    assert all("has no area" in problem.message for problem in problems)
    counts = torch.zeros(3, dtype=torch.int64)
    for dataset in opened.values():
        for i in range(len(dataset)):
            counts += torch.bincount(dataset[i].labels, minlength=3)
    assert counts.tolist() == [361, 4155 - 2, 372]  # both empty boxes are red cells
    with pytest.raises(DamagedAnnotationError, match="2 problems"):
        VOCDataset(root, "trainval", on_damage="refuse")
