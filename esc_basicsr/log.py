"""Logging that ends up in BasicSR's log file where BasicSR runs, and works without it."""

import functools
import logging

# A child of BasicSR's logger "basicsr": same handlers, same level on each rank.
logger = logging.getLogger("basicsr.esc")


@functools.cache
def info_once(message: str) -> None:
    """Log ``message`` at level INFO the first time it is said in this process."""
    logger.info(message)


@functools.cache
def warn_once(message: str) -> None:
    """Log ``message`` at level WARNING the first time it is said in this process."""
    logger.warning(message)
