"""Chapters 1 and 2: the attention score as a bilinear form, and its SVD."""
