import orjson
import pytest
from asgi_correlation_id import correlation_id

from service.core.errors import problem_response, short


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_there_is_404(client, method, problem):
    detail = problem(client.request(method, "/v1/detekt"), 404)
    assert "'/v1/detekt'" in detail


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/detect", "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", "/v1/models/colours", "GET, HEAD"),
        ("PUT", "/health/live", "GET, HEAD"),
        ("POST", "/health/ready", "GET, HEAD"),
    ],
)
def test_another_method_is_405_and_says_which_is_allowed(client, method, path, allowed, problem):
    response = client.request(method, path)
    assert method in problem(response, 405)
    assert response.headers["allow"] == allowed


def test_a_slash_at_the_end_leads_nowhere(client, png, problem):
    response = client.post("/v1/detect/", content=png, headers={"Host": "evil.example"})
    assert "'/v1/detect/'" in problem(response, 404)


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics", "/v1/models", "/v2"])
def test_head_has_the_headers_of_get(client, path):
    head, get = client.head(path), client.get(path)
    assert head.status_code == get.status_code == 200
    assert head.headers["content-type"] == get.headers["content-type"]
    assert client.head("/v1/detect").status_code == 405


def test_members_of_rfc_9457_and_error():
    correlation_id.set("r")
    response = problem_response(422, "no", {"X-Y": "z"})
    assert orjson.loads(response.body) == {
        "type": "about:blank",
        "title": "Unprocessable Entity",
        "status": 422,
        "detail": "no",
        "error": "no",
        "request_id": "r",
    }
    assert response.media_type == "application/problem+json"
    assert response.headers["x-y"] == "z"


def nested(depth: int, width: int) -> list:
    value = []
    for _ in range(depth):
        value = [value] * width
    return value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("cow", "'cow'"),
        (["a", "b"], "['a', 'b']"),
        (None, "None"),
        (1e300, "1e+300"),
        ("x" * 10**7, "'xxx"),
        ([[0] * 99] * 99, "[[0, 0"),
        (dict.fromkeys(range(10**5)), "{0: None"),
        (nested(100_000, 1), "[["),
        (nested(12, 20), "[["),  # 20 ** 6 items within the levels that reprlib shows by default
    ],
    ids=range(9),
)
def test_values_are_quoted_in_short_and_without_walking_all_of_them(value, shown):
    text = short(value)
    assert text.startswith(shown)
    assert len(text) <= 100
    assert text == shown or text.endswith(("...", "]"))
