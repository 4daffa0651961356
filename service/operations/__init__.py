"""What an operator sees: logs, metrics, traces, and drift from training."""
