"""One script per question; results are stored with their provenance."""
