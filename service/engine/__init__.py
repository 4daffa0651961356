"""Sessions, batching and the model repository."""

import os

# Read when onnxruntime is imported. It would send telemetry, and write to stderr if it cannot.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
