"""Smaller cores for detectors: int8 or float16, calibrated and measured."""
