"""Sessions, batching and the model repository."""

from ghm_triton.extras import disable_telemetry

disable_telemetry()
