"""Upscale images on a page in the browser, on this computer alone.

Drop images on it, choose how much larger, compare before and after, download. It is served at 127.0.0.1 only
and loads nothing from elsewhere; images stay on this computer. Ctrl+C ends it.

  python -m esc_basicsr web
"""

import argparse
import itertools
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path, PurePath
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import BoundedSemaphore, Thread
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import logger
from esc_basicsr.common.memory import is_out_of_memory
from esc_basicsr.common.signals import watched_for
from esc_basicsr.upscale.image import upscale_file
from esc_basicsr.upscale.image_file import FORMATS
from esc_basicsr.upscale.upscaler import Upscaler
from esc_basicsr.weights.shipped import default_model, model_list
from esc_basicsr.weights.shown import shown

HOST = "127.0.0.1"
_MOST_BYTES = 2**29  # of a file that is sent
_QUEUE = 8  # requests at a time, of which one is worked on
_SILENCE = 60.0  # seconds after which a browser that stopped sending is given up
# Nothing from elsewhere, even if the page asked for it; and no other site may show the page in a frame.
_POLICY = (
    "default-src 'none'; img-src blob: data:; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; frame-ancestors 'none'"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--port", type=int, default=7860, metavar="N", help="of the page (default: 7860; 0: any that is free)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument(
        "--max-megapixels", type=float, default=50, metavar="N", help="refuse larger inputs (default: 50)"
    )


def run(args: argparse.Namespace) -> int:
    """Serve the page until it is interrupted."""
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port must be from 0 to 65535, got {args.port}.")
    if not 0 < args.max_megapixels < float("inf"):
        raise UserError(f"--max-megapixels must be above 0, got {args.max_megapixels}.")
    sent = TemporaryDirectory(prefix="esc_basicsr_web_", ignore_cleanup_errors=True)
    with watched_for(), sent as folder:  # SIGTERM, too, leaves no images behind
        try:
            server = Server(args.port, Path(folder), args.max_megapixels, args.device)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"port {args.port}: {reason}. Choose another with --port.") from None
        with server, suppress(KeyboardInterrupt):
            server.upscaler(default_model())  # tells of a wrong --device now, and saves the first image time
            print(f"Open {server.address} in a browser. Ctrl+C ends it.", flush=True)
            Thread(target=server.serve_forever, daemon=True).start()
            server.work()
    return 0


class Server(ThreadingHTTPServer):
    """The page and what it asks for: one image is upscaled at a time, by the engine of `upscale`.

    ``serve_forever`` answers in threads, which leave the networks to the one that calls `work`: the main one,
    since an interpreter that ends while another thread is inside PyTorch aborts.

    Args:
        port: Where it listens, on `HOST` alone; 0 is any that is free.
        folder: What is sent lies there: an image until it is answered, a network for good.
        megapixels: Larger images are refused.
        device: Of `Upscaler`.

    Attributes:
        address: Of the page.
    """

    def __init__(self, port: int, folder: Path, megapixels: float = 50, device: str = "auto") -> None:
        super().__init__((HOST, port), _Handler)
        self.address = f"http://{HOST}:{self.server_port}"
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}
        self.folder = folder
        self.megapixels = megapixels
        self.networks = {name: name for name in model_list()}  # the page's names, and what Upscaler takes
        self.numbers = itertools.count(1)
        self.places = BoundedSemaphore(_QUEUE)
        self.tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self.upscaler = lru_cache(maxsize=2)(lambda model: Upscaler(model, device=device))

    def work(self) -> None:
        """Do what the page asks of networks, one after the other, until interrupted."""
        while True:
            task, result = self.tasks.get()
            try:
                result.set_result(task())
            except Exception as error:  # told where the result is awaited
                result.set_exception(error)

    def done(self, task: Callable[[], Any]) -> Any:
        """Return what a task returns, or raise what it raises, when `work` has done it."""
        result: Future[Any] = Future()
        self.tasks.put((task, result))
        return result.result()

    def page(self) -> str:
        """Return the page as HTML."""
        settings = {
            "networks": [{"name": name, "scale": listed.scale} for name, listed in model_list().items()],
            "bytes": _MOST_BYTES,
        }
        text = resources.files(__package__).joinpath("web.html").read_text(encoding="utf-8")
        return text.replace("@@settings@@", json.dumps(settings).replace("<", "\\u003c"))


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _SILENCE

    def do_GET(self) -> None:
        """Send the page."""
        if self._comes_from_the_page():
            is_page = urlsplit(self.path).path == "/"
            status = HTTPStatus.OK if is_page else HTTPStatus.NOT_FOUND
            self._answer(status, self.server.page() if is_page else "no such page", "html")

    def do_POST(self) -> None:
        """Answer an image by a larger one, a network's file by its scale; a mistake by its message."""
        if not self._comes_from_the_page():
            return
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        name = shown(query.get("name", "image"))
        act = {"/image": self._upscale, "/network": self._add_network}.get(url.path)
        if act is None:
            self._answer(HTTPStatus.NOT_FOUND, "no such page")
        elif not self.server.places.acquire(blocking=False):
            with suppress(ConnectionError, TimeoutError):
                for _ in self._parts(self._length()):  # a browser reads no answer before it has sent all
                    pass
            self._answer(
                HTTPStatus.SERVICE_UNAVAILABLE, f"{_QUEUE} images are in work or waiting: try again later."
            )
        else:
            try:
                act(name, query)
            except UserError as error:
                self._answer(HTTPStatus.BAD_REQUEST, str(error))
            except OSError as error:  # the browser went away, or the disk is full
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, f"{name}: {error.strerror or error}")
            except Exception as error:  # of one image; the others are still to be done
                reason = "not enough memory" if is_out_of_memory(error) else repr(error)
                logger.exception("%s could not be upscaled.", name)
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, f"{name}: {reason}")
            finally:
                self.server.places.release()

    def log_message(self, *_: object) -> None:
        """Leave the terminal to warnings."""

    def _comes_from_the_page(self) -> bool:
        """Refuse what other sites' pages ask for, under their names or under one that leads here."""
        host, origin = (self.headers.get(key) for key in ("Host", "Origin"))
        if host in self.server.hosts and origin in (None, f"http://{host}"):
            return True
        self._answer(HTTPStatus.FORBIDDEN, f"open {self.server.address} instead")
        return False

    def _upscale(self, name: str, query: dict[str, str]) -> None:
        kind = query.get("format") or PurePath(query.get("name", "")).suffix.lower()
        suffix = kind if kind in FORMATS else ".png"
        with TemporaryDirectory(dir=self.server.folder) as folder:
            source, target = Path(folder, "input"), Path(folder, f"output{suffix}")
            self._receive(source, name)
            model = self.server.networks.get(query.get("network", ""))
            if model is None:
                raise UserError("this network is no longer here: choose another, or add its file again.")
            try:
                most = int(self.server.megapixels * 10**6)
                self.server.done(
                    lambda: upscale_file(self.server.upscaler(model), source, target, most_pixels=most)
                )
            except UserError as error:
                raise UserError(str(error).replace(str(target), name).replace(str(source), name)) from error
            self._answer(HTTPStatus.OK, target.read_bytes(), FORMATS[suffix].lower())

    def _add_network(self, name: str, query: dict[str, str]) -> None:
        given = query.get("name", "")
        suffix = re.search(r"\.[A-Za-z0-9]{1,16}$", given)  # any other may be none for a file
        file = self.server.folder / f"network{next(self.server.numbers)}{suffix[0] if suffix else ''}"
        try:
            self._receive(file, name)
            scale = self.server.done(lambda: self.server.upscaler(str(file)).scale)
        except UserError as error:
            file.unlink(missing_ok=True)
            raise UserError(str(error).replace(str(file), name)) from error
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        self.server.networks[file.name] = str(file)
        added = {"name": file.name, "title": given, "scale": scale}
        self._answer(HTTPStatus.OK, json.dumps(added), "json")

    def _receive(self, file: Path, name: str) -> None:
        length = self._length()
        if not length:
            raise UserError(f"{name}: a file of 1 byte to {_MOST_BYTES // 2**20} MiB is expected.")
        with file.open("wb") as out:
            out.writelines(self._parts(length))
        if file.stat().st_size < length:
            raise UserError(f"{name} did not arrive whole: try again.")

    def _length(self) -> int:
        """Return how many bytes are sent; 0 where the browser does not tell, or for too many."""
        length = self.headers.get("Content-Length", "")
        is_number = re.fullmatch("[0-9]{1,12}", length)
        return int(length) if is_number and int(length) <= _MOST_BYTES else 0

    def _parts(self, left: int) -> Iterator[bytes]:
        """Read what is sent, so many bytes, or fewer if it breaks off."""
        while left and (part := self.rfile.read(min(left, 2**20))):
            yield part
            left -= len(part)

    def _answer(self, status: HTTPStatus, content: str | bytes, kind: str = "plain") -> None:
        """Send a text (``kind`` is plain, html or json), or the bytes of an image (png, jpeg ...)."""
        is_text = isinstance(content, str)
        data = content.encode("utf-8", "replace") if isinstance(content, str) else content
        with suppress(ConnectionError, TimeoutError):  # the browser went away
            self.send_response(status)
            self.send_header("Content-Type", f"text/{kind}; charset=utf-8" if is_text else f"image/{kind}")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Security-Policy", _POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(data)
