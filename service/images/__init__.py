"""Decoding of images within stated bounds."""
