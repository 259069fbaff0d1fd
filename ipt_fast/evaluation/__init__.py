"""Measuring restored images: metrics, the protocols they belong to, and whole data sets."""
