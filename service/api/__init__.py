"""The v1 routes, and the pipeline from an uploaded image to its answer."""
