"""Training of the unified model."""
