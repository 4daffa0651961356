"""The contract for ONNX detectors that were trained elsewhere."""
