"""What a GPU answers in one call: correctness, speed, memory, and how far from the card's floor that is."""
