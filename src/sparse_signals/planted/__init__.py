"""The appendix: circuits planted by hand, whose true edges are known."""
