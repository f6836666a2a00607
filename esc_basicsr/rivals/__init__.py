"""The networks that the paper compares ESC with: those that no package has, and the way to the others."""
