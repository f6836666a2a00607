"""A training's life: model, loss, states, validation."""
