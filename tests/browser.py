"""A browser without a window, where the machine has one."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The first browser that is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def with_script(page: str, script: str) -> str:
    """A page that runs a script of ours when it has loaded."""
    return page.replace(
        "</body>", f'<script>addEventListener("load", async () => {{{script}}})</script></body>'
    )


def dom_after(page: Path, script: str, width: int = 1000) -> str:
    """The page's elements after it ran a script of ours, as HTML."""
    copy = page.with_name("in_browser.html")
    copy.write_text(with_script(page.read_text(encoding="utf-8"), script), encoding="utf-8")
    return dom_of(copy.as_uri(), page.parent / "profile", width)


def dom_of(address: str, profile: Path, width: int = 1000) -> str:
    """A page's elements when its scripts have run, as HTML."""
    done = subprocess.run(
        _command(profile, width, "--virtual-time-budget=2000", "--dump-dom", address),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _command(profile: Path, width: int, *more: str) -> list[str]:
    """What starts the browser, which reaches nothing but this machine."""
    browser = find()
    assert browser is not None
    return [
        *(browser, "--headless", "--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])),
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
        *(f"--window-size={width},1400", f"--user-data-dir={profile}", *more),
    ]


# Gives the browser its pipes: it reads from descriptor 3 and writes to 4.
_WITH_PIPES = """
import fcntl, os, sys
source, target = (fcntl.fcntl(int(text), fcntl.F_DUPFD, 10) for text in sys.argv[1:3])
os.dup2(source, 3)
os.dup2(target, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Page:
    """A page that is open, steered by the browser's DevTools protocol."""

    def __init__(self, source: Any, target: Any) -> None:
        self._source, self._target = source, target
        self._numbers = itertools.count(1)
        self._session: dict[str, str] = {}
        opened = self.call("Target.createTarget", url="about:blank")
        attached = self.call("Target.attachToTarget", targetId=opened["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A method's result."""
        message = {"id": next(self._numbers), "method": method, "params": parameters, **self._session}
        self._target.write(json.dumps(message).encode() + b"\0")
        self._target.flush()
        while (answer := self._read()).get("id") != message["id"]:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, address: str) -> None:
        """Go to an address, until the page has loaded."""
        self.call("Page.enable")
        self.call("Page.navigate", url=address)
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """What a script, the body of an async function, returns, once it has."""
        expression = f"(async () => {{{script}}})()"
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def screenshot(self, file: Path, width: int, height: int) -> None:
        """Save what is seen in a window of a size."""
        sides = {"width": width, "height": height}
        self.call("Emulation.setDeviceMetricsOverride", **sides, deviceScaleFactor=1, mobile=width < 600)
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _read(self) -> dict[str, Any]:
        message = b""
        while not message.endswith(b"\0"):
            byte = self._source.read(1)
            assert byte, "the browser has ended"
            message += byte
        return json.loads(message[:-1])


@contextmanager
def opened(address: str, profile: Path, width: int = 1000) -> Iterator[Page]:
    """Show a page for as long as the block lasts; a script may take its time, unlike in `dom_of`."""
    (read_by_it, write), (read, written_by_it) = os.pipe(), os.pipe()
    command = _command(profile, width, "--remote-debugging-pipe")
    with os.fdopen(read, "rb") as source, os.fdopen(write, "wb") as target:
        launcher = [sys.executable, "-c", _WITH_PIPES, str(read_by_it), str(written_by_it)]
        pipes = {"pass_fds": (read_by_it, written_by_it), "stderr": subprocess.DEVNULL}
        with subprocess.Popen([*launcher, *command], **pipes) as process:
            os.close(read_by_it)
            os.close(written_by_it)
            try:
                page = Page(source, target)
                page.open(address)
                yield page
            finally:
                process.terminate()
