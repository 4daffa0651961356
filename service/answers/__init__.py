"""What the service says: boxes in the image's own pixels, each with its threshold."""
