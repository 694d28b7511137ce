"""Chapter 4: who wrote what made a head fire, followed upstream."""
