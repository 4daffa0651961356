"""Training a detector: configuration, compatibility, build, loop, hooks and checkpoints."""
