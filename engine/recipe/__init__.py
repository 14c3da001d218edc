"""Sparsification recipes: read from a file (`text`, `values`, `document`), as plain data (`modifiers`), and acting through the loop's seams."""
