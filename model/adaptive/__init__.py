"""What makes the model adaptive: density, tiling, routing, pacing."""
