"""From a checkpoint to an ONNX detector that carries its thresholds and the reasons for them."""

from ghm_triton.extras import disable_telemetry

disable_telemetry()
