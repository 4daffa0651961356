"""Kind 11: variables that a platform sets, and settings that make no sense."""

import pytest

from tests.attack.core import cases, run, serving

KUBERNETES = {
    "GHM_SERVICE_HOST": "10.96.0.7",
    "GHM_SERVICE_PORT": "8000",
    "GHM_PORT": "tcp://10.96.0.7:8000",
    "GHM_PORT_8000_TCP": "tcp://10.96.0.7:8000",
    "GHM_PORT_8000_TCP_ADDR": "10.96.0.7",
}
SHELL = ("sh", "-c")
STARTS = {
    "Kubernetes' service links": ((), KUBERNETES),
    "uvicorn's workers": ((), {"WEB_CONCURRENCY": "64"}),
    "uvicorn's trusted proxies": ((), {"FORWARDED_ALLOW_IPS": "*"}),
    "a temporary folder that is missing": ((), {"TMPDIR": "/proc/nowhere"}),
    "no home": (("env", "-u", "HOME"), {}),
    "ASCII": ((), {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}),
    "no assertions": ((), {"PYTHONOPTIMIZE": "2"}),
    "warnings that are errors at the start": ((), {"PYTHONDEVMODE": "1"}),
    "unknown settings": ((), {"GHM_NONSENSE": "1", "GHM_": "1"}),
    "empty settings": ((), {"GHM_PORT": "", "GHM_TOKENS": "", "GHM_WORKERS": ""}),
    "a folder that is gone": (
        (*SHELL, 'd=$(mktemp -d); cd "$d"; rmdir "$d"; exec "$@"', "sh"),
        {},
    ),
    "a mask that forbids everything": ((*SHELL, 'umask 777; exec "$@"', "sh"), {}),
    "no standard error": ((*SHELL, 'exec "$@" 2>&-', "sh"), {}),
    "traces that nobody takes": (
        (),
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SERVICE_NAME": "x"},
    ),
}
REFUSED = {
    "port of text": {"GHM_PORT": "http"},
    "port beyond 65535": {"GHM_PORT": "70000"},
    "10^30 workers": {"GHM_WORKERS": "1" + "0" * 30},
    "negative threads": {"GHM_THREADS": "-1"},
    "deadline that is no number": {"GHM_DEADLINE_MS": "nan"},
    "endless deadline": {"GHM_DEADLINE_MS": "inf"},
    "rate that is no number": {"GHM_RATE_LIMIT": "nan"},
    "size of 10^30 pixels": {"GHM_MAX_PIXELS": "1" + "0" * 30},
    "token with a space": {"GHM_TOKENS": "a b"},
    "file of tokens that is missing": {"GHM_TOKENS_FILE": "/proc/nowhere"},
    "file of tokens that is a folder": {"GHM_TOKENS_FILE": "/proc"},
    "host that is none": {"GHM_HOST": "nowhere.invalid"},
    "host with escapes": {"GHM_HOST": "\x1b[2J"},
    "value that is not UTF-8": {"GHM_LOG_LEVEL": "\udcff"},
    "origin with a path": {"GHM_CORS_ORIGINS": "https://a.example/b"},
    "proxy that is no address": {"GHM_TRUSTED_PROXIES": "everybody"},
    "certificate that is missing": {"GHM_SSL_CERTFILE": "/proc/nowhere"},
}


@pytest.mark.parametrize(("prefix", "variables"), cases(11, STARTS))
def test_a_platform_cannot_keep_it_from_starting(detector, png, tmp_path, prefix, variables):
    port = "GHM_PORT" not in variables
    free = {} if port else {"GHM_PORT": variables["GHM_PORT"]}
    with serving(detector, tmp_path, prefix=prefix, port=port, **(variables | free)) as service:
        assert service.port, service.log()
        service.detects(png)
        if "FORWARDED_ALLOW_IPS" in variables:
            service.ask("/v1/models", X_Forwarded_For="203.0.113.1")
            assert "203.0.113.1" not in service.log()
        assert len(service.pids()) == 1
        service.lives()


@pytest.mark.parametrize("variables", cases(11, REFUSED))
def test_a_setting_without_sense_ends_the_start_in_one_sentence(detector, variables):
    done = run("serve", detector, **variables)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not set(done.stderr) & {"\x1b"}
    assert done.stderr.splitlines()[-1].startswith("ghm serve: ")
