"""The v1 routes and the pipeline behind them."""
