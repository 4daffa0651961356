import base64
import hmac
import logging

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.core.settings import SettingsError
from service.http import auth
from service.http.auth import (
    CHECK_SECONDS,
    GUESSES,
    AuthMiddleware,
    TokenStore,
    is_public,
    parse_tokens,
)
from service.http.limiter import Limiter

ALICE, BOB = "alice-Token_1.~+/==", "bob-token"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def names(tokens) -> list[str]:
    return [token.name for token in tokens]


def test_tokens_with_and_without_names():
    assert names(parse_tokens([f"alice:{ALICE}", " ", "# old:x", f" {BOB} "], "here")) == [
        "alice",
        "token-2",
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("a b:secret-x", "here: the name of token 1 may have"),
        ("x" * 65 + ":secret-x", "the name of token 1"),
        (":secret-x", "the name of token 1"),
        ("me:", r"token 1 \(me\) is empty or has characters"),
        ("me:secret-x y", r"token 1 \(me\)"),
        ("me:secret-xé", r"token 1 \(me\)"),
        ("me:secret:x", r"token 1 \(me\)"),
    ],
)
def test_a_token_that_cannot_be_is_named_by_its_place(entry, message):
    with pytest.raises(SettingsError, match=message) as error:
        parse_tokens([entry], "here")
    assert "secret" not in str(error.value)


def test_one_token_under_two_names_is_an_error_and_one_name_for_two_tokens_is_not():
    with pytest.raises(SettingsError, match="here: a and b are the same token"):
        parse_tokens([f"a:{BOB}", f"b:{BOB}"], "here")
    assert names(parse_tokens([f"a:{BOB}", f"a:{ALICE}"], "here")) == ["a", "a"]  # to change it


def test_tokens_that_are_ours_and_others(serve_with, png, problem):
    with serve_with(tokens=f"alice:{ALICE},{BOB}") as client:
        for token in (ALICE, BOB):
            assert client.post("/v1/detect", content=png, headers=bearer(token)).is_success
        for scheme in ("bearer", "BEARER"):
            headers = {"Authorization": f"{scheme} {BOB}"}
            assert client.get("/v1/models", headers=headers).is_success
        for token in (BOB[:-1], BOB + "x", BOB.upper(), "", "é".encode().decode("latin-1")):
            refused = client.get(
                "/v1/models", headers={"Authorization": f"Bearer {token}".encode("latin-1")}
            )
            assert problem(refused, 401) == "this token is not known"
            assert refused.headers["www-authenticate"] == (
                'Bearer realm="ghm", error="invalid_token"'
            )
        basic = base64.b64encode(f"x:{BOB}".encode()).decode()
        for headers in ({}, {"Authorization": f"Basic {basic}"}, {"Authorization": BOB}):
            refused = client.get("/v1/models", headers=headers)
            assert "Authorization: Bearer TOKEN" in problem(refused, 401)
            assert refused.headers["www-authenticate"] == 'Bearer realm="ghm"'


def test_every_token_is_compared_whichever_is_right(told, monkeypatch):
    compared, real = [], hmac.compare_digest

    def compare(one, other):
        compared.append(one)
        return real(one, other)

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    store = TokenStore(told(tokens="a:first,b:second,c:third"))
    for presented, name in (("first", "a"), ("third", "c"), ("none", None)):
        compared.clear()
        found = store.find(presented)
        assert (found.name if found else None) == name
        assert len(compared) == 3


def test_with_tokens_openapi_says_so_where_it_is_so(serve_with):
    with serve_with(tokens=BOB) as client:
        document = client.get("/openapi.json").json()
        assert document["components"]["securitySchemes"] == {
            "bearer": {"type": "http", "scheme": "bearer"}
        }
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                answered = client.request(method, path).status_code
                assert ("401" in operation["responses"]) == (answered == 401), path
                assert ("security" in operation) == (answered == 401), path


def test_a_file_is_read_again_when_it_changes(told, tmp_path, clock, caplog):
    path = tmp_path / "tokens"
    path.write_text(f"# ours\nalice:{ALICE}\n\n")
    store = TokenStore(told(tokens_file=path, tokens=f"bob:{BOB}"), clock)
    assert store.find(ALICE).name == "alice"
    assert store.find(BOB).name == "bob"
    clock.now += CHECK_SECONDS
    with caplog.at_level(logging.INFO, logger="ghm.service"):
        store.find(BOB)
    assert "read" not in caplog.text  # it has not changed
    path.write_text("carol:carols-token\n")
    clock.now += CHECK_SECONDS / 2
    assert store.find("carols-token") is None  # not at every request
    clock.now += CHECK_SECONDS
    assert store.find("carols-token").name == "carol"
    assert store.find(ALICE) is None
    assert store.find(BOB).name == "bob"
    path.write_text("")
    clock.now += CHECK_SECONDS
    assert store.find("carols-token") is None  # whoever empties it means it


@pytest.mark.parametrize("damage", ["bad name:x", b"\xff\xfe", None])
def test_a_file_that_got_damaged_leaves_the_tokens_as_they_were(
    told, tmp_path, clock, caplog, damage
):
    path = tmp_path / "tokens"
    path.write_text(f"alice:{ALICE}\n")
    store = TokenStore(told(tokens_file=path), clock)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    clock.now += CHECK_SECONDS
    with caplog.at_level(logging.ERROR, logger="ghm.service"):
        assert store.find(ALICE).name == "alice"
        clock.now += CHECK_SECONDS
        store.find(ALICE)
    assert "the tokens stay as they were" in caplog.text
    path.write_text(f"bob:{BOB}\n")
    clock.now += CHECK_SECONDS
    assert store.find(BOB).name == "bob"


def test_a_start_without_any_token_is_refused(told, tmp_path):
    path = tmp_path / "tokens"
    with pytest.raises(SettingsError, match=r"tokens_file .*tokens: No such file"):
        TokenStore(told(tokens_file=path))
    path.write_text("# none yet\n")
    with pytest.raises(SettingsError, match="tokens holds no token, so every"):
        TokenStore(told(tokens_file=path))
    with pytest.raises(SettingsError, match="GHM_TOKENS holds no token"):
        TokenStore(told(tokens=" , "))
    assert TokenStore(told(tokens=BOB, tokens_file=path)).required


OPEN = ["/", "/static/app.js", "/docs", "/openapi.json"]
HEALTH = ["/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"]
GUARDED = ["/v1/detect", "/v1/models", "/v2", "/v2/", "/v2/models/x", "/nowhere", "/static", "//"]


@pytest.mark.parametrize(
    ("changes", "public", "private"),
    [
        ({}, OPEN + HEALTH, [*GUARDED, "/metrics", "/healthy"]),
        (
            {"public_health": False, "public_metrics": True},
            [*OPEN, "/metrics"],
            [*GUARDED, *HEALTH, "/metrics/../v1/models"],
        ),
    ],
)
def test_public_paths_need_no_token(serve_with, told, changes, public, private):
    settings = told(**changes)
    assert [path for path in public if not is_public(path, settings)] == []
    assert [path for path in private if is_public(path, settings)] == []
    with serve_with(tokens=BOB, **changes) as client:
        for path in public:
            assert client.get(path).status_code != 401, path
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers=bearer(BOB)).is_success
        counted = client.get("/metrics", headers=bearer(BOB)).text
    assert 'ghm_rejected_requests_total{reason="unauthorized"} 1.0' in counted


def test_without_tokens_the_service_is_open_and_its_document_has_no_401(client):
    assert client.get("/v1/models").is_success
    document = client.get("/openapi.json").json()
    assert "securitySchemes" not in document["components"]
    assert "401" not in str(document["paths"])


def test_tokens_are_neither_kept_nor_shown(told):
    settings = told(tokens=BOB)
    tokens = parse_tokens([ALICE], "here")
    assert BOB not in repr(settings) + str(settings.model_dump())
    assert ALICE not in repr(tokens)


def test_guesses_of_a_token_are_slowed_for_the_address_that_guesses(told, model, clock):
    app = create_app(told(tokens=f"a:{ALICE},b:{BOB}"), model)

    def ask(token: str, host: str = "198.51.100.7") -> int:
        async def connected(scope, receive, send):
            await app({**scope, "client": (host, 1)}, receive, send)

        return TestClient(connected).get("/v1/models", headers=bearer(token)).status_code

    assert ask(ALICE) == 200
    middleware = app.middleware_stack
    while not isinstance(middleware, AuthMiddleware):
        middleware = middleware.app
    middleware.guesses = Limiter(1.0, GUESSES, "guesses", clock=clock)
    assert [ask("wrong") for _ in range(GUESSES)] == [401] * GUESSES
    assert [ask("wrong"), ask(BOB)] == [429, 429]  # a right guess is not told from a wrong one
    assert ask(ALICE) == 200  # it was right before
    assert ask(BOB, "203.0.113.9") == 200
    clock.now += 1
    assert [ask("wrong"), ask("wrong")] == [401, 429]
    clock.now += 1
    assert ask(BOB) == 200
