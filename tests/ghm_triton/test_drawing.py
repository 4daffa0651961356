import pytest
from PIL import Image

from ghm_triton.drawing import draw_detections


def test_boxes_are_drawn_where_they_are():
    drawn = draw_detections(Image.new("RGB", (64, 32), "white"), [([8.0, 12, 40, 28], "seven", 7)])
    assert drawn.size == (512, 256)
    assert drawn.getpixel((64, 160)) != (255, 255, 255)  # left edge, eight times enlarged
    assert drawn.getpixel((200, 160)) == (255, 255, 255)  # inside
    untouched = draw_detections(Image.new("RGB", (64, 32), "white"), [])
    assert untouched.getcolors() == [(512 * 256, (255, 255, 255))]


def test_a_line_feed_in_a_caption_is_escaped():
    box = [10.0, 20.0, 30.0, 40.0]
    one, other = (
        draw_detections(Image.new("RGB", (64, 64)), [(box, t, 0)]) for t in ("a\nb", r"a\nb")
    )
    assert one == other


@pytest.mark.parametrize("box", [[0.0, 0.0, 20.0, 20.0], [600.0, 5.0, 640.0, 40.0]])
def test_captions_at_the_edge_do_not_fail(box):
    image = draw_detections(Image.new("RGB", (640, 480)), [(box, "a long caption 0.99", 3)])
    assert image.size == (640, 480)
