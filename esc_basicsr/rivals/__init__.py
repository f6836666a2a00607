"""The networks that the paper compares ESC with, as far as neither BasicSR nor spandrel has them."""
