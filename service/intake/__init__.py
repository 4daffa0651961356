"""From a request to rows of a model's input: bodies, options, images."""
