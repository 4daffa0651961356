"""One script a question; results with their provenance beside them."""
