"""A training's life: model, loss, states, validation."""

# Before any module of this room needs it: BasicSR, once imported, has these modules registered with it.
import basicsr  # noqa: F401
