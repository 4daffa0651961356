"""Detectors on torchvision: backbones, heads, assigners and post-processing."""
