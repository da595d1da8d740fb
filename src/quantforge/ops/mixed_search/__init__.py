"""The best rows of vectors whose directions have different bits, by exact integer products."""
