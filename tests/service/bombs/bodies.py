"""Bodies of requests: a form after its Content-Type, and JSON."""

from collections.abc import Callable

from registry import BUILDERS

TWO_FILES = (
    b"multipart/form-data; boundary=b\n"
    b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n'
    b"Content-Type: image/png\r\n\r\n\x89PNG\r\n--b\r\n"
    b"Content-Disposition: form-data; name=\"files\"; filename*=UTF-8''%e2%82%ac.png\r\n\r\nx\r\n"
    b'--b\r\nContent-Disposition: form-data; name="iou"\r\n\r\n0.5\r\n--b--\r\n'
)
BODIES: dict[str, Callable[[], bytes]] = {
    "form-200-two-files": lambda: TWO_FILES,
    "form-400-cut-short": lambda: TWO_FILES[:-9],
    "form-400-no-boundary": lambda: b"multipart/form-data" + TWO_FILES[31:],
    "form-400-boundary-too-long": lambda: TWO_FILES.replace(b"=b\n", b"=" + b"b" * 300 + b"\n"),
    "form-400-header-of-100-kilobytes": lambda: TWO_FILES.replace(b"image/png", b"x" * 100_000),
    "form-400-part-without-a-name": lambda: TWO_FILES.replace(b"; name=", b"; nome="),
    "form-400-many-files": lambda: b"x; boundary=b\n" + TWO_FILES[31:][:80] * 6,
    "form-422-unknown-option": lambda: TWO_FILES.replace(b'"iou"', b'"uoi"'),
    "json-200-two-images": lambda: b'{"images": ["eA==", "eA=="], "thresholds": {"dog": 0.5}}',
    "json-200-options": lambda: (
        b'{"image": "eA==", "iou": 0.5, "classes": ["a"], "max_detections": 3, "threshold": 0.1,'
        b' "format": "coco", "image_ids": [1], "model": "m", "version": null}'
    ),
    "json-400-nesting": lambda: b"[" * 100_000,
    "json-400-no-image": lambda: b'{"threshold": 0.5}',
    "json-400-no-base64": lambda: b'{"image": "e"}',
    "json-400-infinity": lambda: b'{"image": "eA==", "threshold": 1e999}',
    "json-422-true": lambda: b'{"image": "eA==", "threshold": true}',
}
BUILDERS |= BODIES
