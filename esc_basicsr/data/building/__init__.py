"""Sets from folders of images."""
