"""What every chapter stands on: models, prompts, runs, numbers."""
