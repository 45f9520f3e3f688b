"""Quality for compute, on held-out documents."""
