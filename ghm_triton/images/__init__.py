"""Bounded decoding of image files, without torch."""
