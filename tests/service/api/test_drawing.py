import io

import pytest
from PIL import Image

from service.api.drawing import JPEG, PNG, draw, preferred_type
from service.api.routes.detect import coco_results

FOUND = {"box": [1.0, 2.0, 4.5, 8.25], "score": 0.5, "label": 2, "class": "cat"}


def test_coco_counts_categories_from_one_and_boxes_by_their_size():
    results = coco_results([{"detections": [FOUND]}, {"detections": []}], [7, 8])
    assert results == [
        {"image_id": 7, "category_id": 3, "bbox": [1.0, 2.0, 3.5, 6.25], "score": 0.5}
    ]


def test_every_image_needs_an_id():
    with pytest.raises(ValueError, match="zip"):
        coco_results([{"detections": []}] * 2, [7])


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", PNG),
        ("*/*", PNG),
        ("image/*", PNG),
        ("image/png, image/jpeg", PNG),
        ("image/jpeg", JPEG),
        ("IMAGE/JPEG", JPEG),
        ("image/jpeg, */*;q=0.8", JPEG),
        ("image/png;q=0.9, image/jpeg;q=0.8", PNG),
        ("image/png;q=0, */*", JPEG),
        ("image/jpeg;q=high", PNG),
    ],
)
def test_jpeg_where_accept_prefers_it(accept, kind):
    assert preferred_type(accept) == kind


@pytest.mark.parametrize(("kind", "name"), [(PNG, "PNG"), (JPEG, "JPEG")])
def test_boxes_are_drawn_and_the_image_is_left_as_it_was(kind, name):
    image = Image.new("RGB", (600, 400), "white")
    drawing = Image.open(io.BytesIO(draw(image, [FOUND], kind)))
    assert (drawing.format, drawing.size) == (name, (600, 400))
    assert image.getcolors() == [(240_000, (255, 255, 255))]
    assert len(drawing.convert("RGB").getcolors(10**6)) > 1
