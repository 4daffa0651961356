"""Train and measure every method, detector, seed and data set of a grid."""
