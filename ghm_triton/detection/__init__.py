"""Detectors on torchvision, data sets, the training loop and evaluation."""
