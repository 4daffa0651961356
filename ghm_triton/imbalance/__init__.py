"""Other methods against imbalance: hard examples, cleanliness, adversaries, no sampling."""
