"""The short way through plain forms against the parser that reads every form."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.errors import ProblemError
from service.http import forms

BOUNDARY = "----bound"
TYPE = f"multipart/form-data; boundary={BOUNDARY}"

# Bytes in which line ends, dashes and boundaries meet more often than by chance.
CONTENT = st.lists(
    st.sampled_from([b"\r\n", b"--", b"----bound", b"\r\n------bound", b"\r", b"\n", b"x", b"\xff"])
).map(b"".join)
NAMES = st.sampled_from(["file", "files", "iou", "a.b-c", 'quo"te', "ü", ""])
HEADS = st.sampled_from(
    [
        'Content-Disposition: form-data; name="{}"',
        'Content-Disposition: form-data; name="{}"; filename="photo (1).jpg"',
        'Content-Disposition: form-data; name="{}"; filename="a.png"\r\nContent-Type: image/png',
        'content-disposition: form-data; name="{}"',
        'Content-Disposition: form-data; name="{}"; filename="%41\\"b.png"',
        'Content-Type: text/plain\r\nContent-Disposition: form-data; name="{}"',
        'Content-Disposition: attachment; name="{}"',
        "X-Other: {}",
    ]
)
ENDS = st.sampled_from([b"--\r\n", b"--", b"--\r\nepilogue", b"", b"\r\n"])
PARTS = st.lists(st.tuples(HEADS, NAMES, CONTENT), max_size=3)


def body_of(parts, end=b"--\r\n", before=b"") -> bytes:
    pieces = [before]
    for head, name, content in parts:
        pieces.append(f"--{BOUNDARY}\r\n{head.format(name)}\r\n\r\n".encode() + content + b"\r\n")
    return b"".join([*pieces, b"--", BOUNDARY.encode(), end])


def outcome(body: bytes):
    try:
        return forms.parse_form(TYPE, body, 2)
    except ProblemError as problem:
        return problem.status


@settings(max_examples=600, deadline=None)
@given(PARTS, ENDS, st.sampled_from([b"", b"\r\n", b"preamble\r\n"]))
def test_both_ways_read_the_same(parts, end, before):
    body = body_of(parts, end, before)
    short = outcome(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "_plain_parts", lambda *_: None)
        assert outcome(body) == short


def test_what_common_clients_send_takes_the_short_way(monkeypatch):
    def parser(*_):
        pytest.fail("the parser was asked")

    monkeypatch.setattr(forms, "MultipartParser", parser)
    heads = [
        'Content-Disposition: form-data; name="file"; filename="photo.jpg"\r\n'
        "Content-Type: image/jpeg",
        'Content-Disposition: form-data; name="threshold"',
    ]
    body = body_of([(heads[0], "", b"\xff\xd8 picture"), (heads[1], "", b"0.5")])
    photo, threshold = forms.parse_form(TYPE, body, 1)
    assert photo == forms.Part("file", "photo.jpg", b"\xff\xd8 picture")
    assert threshold == forms.Part("threshold", None, b"0.5")


@pytest.mark.parametrize("files", [1, 3])
def test_the_short_way_counts_files_too(files):
    head = 'Content-Disposition: form-data; name="files"; filename="a.png"'
    body = body_of([(head, "", b"x")] * files)
    if files > 2:
        with pytest.raises(ProblemError, match="more than 2 files"):
            forms.parse_form(TYPE, body, 2)
    else:
        assert len(forms.parse_form(TYPE, body, 2)) == files


def test_a_long_field_is_refused_on_either_way():
    head = 'Content-Disposition: form-data; name="iou"'
    with pytest.raises(ProblemError, match="65536"):
        forms.parse_form(TYPE, body_of([(head, "", b"x" * 65_537)]), 1)


def test_a_part_without_the_blank_line_behind_its_head_is_malformed():
    body = b"--" + BOUNDARY.encode() + b'\r\nContent-Disposition: form-data; name="x"\r\n--'
    with pytest.raises(ProblemError) as refused:
        forms.parse_form(TYPE, body + BOUNDARY.encode() + b"--\r\n", 2)
    assert refused.value.status == 400
