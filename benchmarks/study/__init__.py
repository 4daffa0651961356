"""The study: methods, detectors, seeds and data sets of a grid, each trained and measured."""
