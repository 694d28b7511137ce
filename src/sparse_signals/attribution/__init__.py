"""Chapter 6: the difference between two answers, split exactly over all edges of a model."""
