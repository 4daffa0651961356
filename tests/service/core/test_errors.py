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
        ("DELETE", "/v1/models", "GET"),
        ("POST", "/v1/models/colours", "GET"),
        ("PUT", "/health/live", "GET"),
        ("POST", "/health/ready", "GET"),
    ],
)
def test_another_method_is_405_and_says_which_is_allowed(client, method, path, allowed, problem):
    response = client.request(method, path)
    assert method in problem(response, 405)
    assert response.headers["allow"] == allowed


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


def test_short_values_are_whole_and_long_ones_cut():
    assert short("ab") == "'ab'"
    assert len(short("a" * 1000)) == 100


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("cow", "'cow'"),
        (["a", "b"], "['a', 'b']"),
        (None, "None"),
        (True, "True"),
        (1e300, "1e+300"),
    ],
)
def test_values_are_quoted_as_they_are(value, shown):
    assert short(value) == shown


@pytest.mark.parametrize("value", ["x" * 10**7, [[0] * 99] * 99, {n: n for n in range(10**5)}])
def test_large_values_are_quoted_in_short(value):
    assert 50 < len(short(value)) <= 100
    assert short(value).endswith("...")


def test_deep_values_can_be_quoted():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert len(short(deep)) <= 100


def test_a_value_nested_and_wide_is_quoted_without_walking_all_of_it():
    value = 0
    for _ in range(12):  # 20 ** 6 items within the levels that reprlib shows by itself
        value = [value] * 20
    assert short(value).startswith("[[")
