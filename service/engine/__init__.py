"""Sessions, batching and the model repository."""
