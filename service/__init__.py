"""From an ONNX detector to answers over HTTP. Nothing in this package imports torch."""
