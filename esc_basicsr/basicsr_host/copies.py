"""The BasicSRs of this machine, of which Python imports the first."""

import sys
from pathlib import Path

from esc_basicsr.common.log import logger


def copies() -> list[Path]:
    """List every BasicSR that Python could import, the one that it does first."""
    places = [Path(entry or ".").resolve() / "basicsr" for entry in sys.path]
    # 'pip install --editable' may leave a finder instead of a path
    specs = (getattr(finder, "find_spec", lambda *_: None)("basicsr", None) for finder in sys.meta_path)
    places += [Path(spec.origin).resolve().parent for spec in specs if spec is not None and spec.origin]
    return list(dict.fromkeys(place for place in places if (place / "__init__.py").is_file()))


def warn_of_shadowing() -> None:
    """Log that a BasicSR in the working directory, such as a clone, is taken for the installed one."""
    found = copies()
    if len(found) > 1 and found[0].parent == Path.cwd():
        logger.warning(
            "BasicSR is imported from the working directory, %s, and not from %s, where it is installed. "
            "Start in another folder to use that.",
            *found[:2],
        )
