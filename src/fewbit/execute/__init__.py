"""Run a captured graph with something watched, replaced or quantized on the way."""
