"""From a checkpoint to an ONNX detector that carries its thresholds and says where they came from."""
