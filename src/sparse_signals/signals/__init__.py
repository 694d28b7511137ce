"""Chapter 3: firings, the slices of their scores, and what sparsity must be compared with."""
