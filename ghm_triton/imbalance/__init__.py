"""Other answers to imbalance: hard examples, clean anchors, adversaries, no sampling."""
