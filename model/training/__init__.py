"""Training: data, loss, optimiser, the loop."""
