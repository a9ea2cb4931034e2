"""A scan that could have been measured, with its ground truth; apart from the reconstruction."""
