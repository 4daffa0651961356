import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.core.settings import Settings, SettingsError
from service.http.middleware import parse_origins

PAGE = "https://example.com"


@pytest.fixture
def crossed(detector, model):
    def make(**changes) -> TestClient:
        settings = Settings(model=detector, threads=1, provider="cpu", **changes)
        return TestClient(create_app(settings, model))

    return make


def preflight(client, origin=PAGE, method="POST"):
    return client.options(
        "/v1/detect",
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": method,
            "Access-Control-Request-Headers": "authorization,content-type",
        },
    )


def test_a_page_of_an_origin_that_we_know_may_call(crossed, png):
    with crossed(cors_origins=f"{PAGE}, http://localhost:3000", tokens="abc") as client:
        asked = preflight(client)  # browsers send no token with it
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == PAGE
        allowed = asked.headers["access-control-allow-headers"].lower()
        assert "authorization" in allowed
        headers = {"Origin": PAGE, "Authorization": "Bearer abc"}
        answer = client.post("/v1/detect", content=png, headers=headers)
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        refused = client.post("/v1/detect", content=png, headers={"Origin": PAGE})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == PAGE  # or the page sees no reason


def test_others_may_not(crossed):
    with crossed(cors_origins=PAGE) as client:
        asked = preflight(client, "https://evil.example")
        assert asked.status_code == 400
        assert "access-control-allow-origin" not in asked.headers
        assert preflight(client, method="DELETE").status_code == 400


def test_everybody_may_with_a_star_but_without_credentials(crossed):
    with crossed(cors_origins="*") as client:
        asked = preflight(client, "https://anywhere.example")
        assert asked.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in asked.headers


def test_without_the_setting_there_is_no_cors(client):
    answer = client.get("/health/live", headers={"Origin": PAGE})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "text", ["example.com", "https://a.b/", "https://a.b/c", "ftp://a.b", "x *"]
)
def test_what_no_browser_would_send_is_refused(text):
    with pytest.raises(SettingsError, match=r"cors_origins: .* is no origin"):
        parse_origins(f"{PAGE},{text}")


def test_origins():
    assert parse_origins(f" {PAGE} ,, HTTP://localhost:1,*") == [PAGE, "HTTP://localhost:1", "*"]


def test_a_refusal_has_a_request_id_of_its_own(crossed, problem):
    with crossed(tokens="abc") as client:
        problem(client.get("/v1/models"), 401)  # compares the header with the body
