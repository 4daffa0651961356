"""From a checkpoint to an ONNX detector that carries its thresholds and the reasons for them."""
