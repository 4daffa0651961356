"""onnxruntime is imported with its telemetry turned off, whichever package comes first."""

import os
import subprocess
import sys

import pytest

IMPORT_ALL = """
import importlib, os, pkgutil, sys

class Watch:
    def find_spec(self, name, *_):
        if name == "onnxruntime":
            print(os.environ.get("ORT_DISABLE_TELEMETRY"))

sys.meta_path.insert(0, Watch())
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, f"{sys.argv[1]}."):
    if not module.name.endswith(".__main__"):
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")], ids=["unset", "user's"])
@pytest.mark.parametrize(
    "package", ["export", "service", "export.quantize", "export.attach", "service.engine"]
)
def test_telemetry_is_off_before_onnxruntime_is_imported(package, before, after):
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    if before is not None:
        environment["ORT_DISABLE_TELEMETRY"] = before
    command = [sys.executable, "-c", IMPORT_ALL, package]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert set(done.stdout.split()) == {after}


def test_the_library_itself_imports_no_onnxruntime():
    code = f"{IMPORT_ALL}\nassert 'onnxruntime' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "ghm_triton"], check=True, capture_output=True)
