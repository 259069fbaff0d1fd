"""Images, degradations and training data."""
