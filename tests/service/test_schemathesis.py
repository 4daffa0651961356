"""Requests made up from our own OpenAPI document: each answer must be one that it describes.

Cases a route are few here. For 10,000 in all, some minutes:

    SCHEMATHESIS_EXAMPLES=600 python -m pytest tests/service/test_schemathesis.py
"""

import os
from collections import Counter

import pytest
import schemathesis
import schemathesis.openapi
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from service.app import create_app

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "10"))

told = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 10,  # the same cases in every run of the suite
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


# A schema cannot say which bytes are an image, which classes the model knows, or which classes
# and steps go together: what it allows may be refused for these, by the statuses it documents.
REFUSALS = [400, 413, 415, 422]
KNOWN = {"name": "colours", "version": "1"}
ACCEPTED = ["2xx", 401, 404, 409, 429, *REFUSALS]


async def acknowledge(receive, send) -> None:
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})


@pytest.fixture(scope="session")
def api(request, png, encode, image):
    files = [png, encode(image, "JPEG"), encode(image, "WEBP"), encode(image.resize((9, 7)), "GIF")]
    pictures = st.sampled_from([*files, png[:200]]) | st.binary(max_size=50)
    schemathesis.openapi.format("binary", pictures)
    for kind in ("image/*", "application/octet-stream"):
        schemathesis.openapi.media_type(kind, pictures)
    service = create_app(request.getfixturevalue("settings"), request.getfixturevalue("model"))

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":  # schemathesis would start and stop it again and again
            await acknowledge(receive, send)
        else:
            await service(scope, receive, send)

    checks = {"positive_data_acceptance": {"expected-statuses": ACCEPTED}}
    config = schemathesis.Config.from_dict({"checks": checks})
    return schemathesis.openapi.from_asgi("/openapi.json", app, config=config)


def test_answers_are_as_documented(api):
    operations = [found.ok() for found in api.get_all_operations()]
    assert len(operations) > 8
    statuses = Counter()
    for operation in operations:

        @told
        @given(case=operation.as_strategy(), known=st.integers(0, 3))
        def check(case, known):
            if known:  # names that are made up lead nowhere
                case.path_parameters |= {key: KNOWN[key] for key in case.path_parameters}
            response = case.call_and_validate()
            statuses[case.operation.path, response.status_code] += 1

        check()
    print(f"{statuses.total()} cases", *sorted(statuses.items()), sep="\n")
    for path in ("/v1/detect", "/v1/thresholds/preview"):
        assert statuses[path, 200] > 0  # not everything was refused


def test_answers_in_sequence_are_as_documented(api):
    machine = api.as_state_machine()
    machine.run(settings=settings(told, stateful_step_count=5))
