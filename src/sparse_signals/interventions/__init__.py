"""Chapter 5: take signals away, and see what the model does then."""
