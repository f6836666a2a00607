"""A report on a GPU, in one call: correctness, speed, memory, and how far from the card's floor that is."""
