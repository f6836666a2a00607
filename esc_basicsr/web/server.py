"""A server of one page, for this computer alone: files are sent to it and come back larger."""

import itertools
import json
import re
import shutil
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path, PurePath
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import BoundedSemaphore
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.log import warnings_of_this_thread
from esc_basicsr.common.memory import is_out_of_memory
from esc_basicsr.data.image_folder import VIDEO_SUFFIXES
from esc_basicsr.upscale.image import upscale_file
from esc_basicsr.upscale.image_file import DEFAULT_CRF, FORMATS, VIDEO_FORMATS
from esc_basicsr.upscale.output_size import OutputSize, read_box, read_factor
from esc_basicsr.upscale.upscaler import Upscaler
from esc_basicsr.web.page import page
from esc_basicsr.weights.shipped import model_list
from esc_basicsr.weights.shown import shown

HOST = "127.0.0.1"
_MOST_BYTES = 2**29  # of a file that is sent
_QUEUE = 8  # requests at a time, of which one is worked on
_SILENCE = 60.0  # seconds after which a browser that stopped sending or receiving is given up
_TICK = 0.5  # seconds between two lines on how far the work is


class Server(ThreadingHTTPServer):
    """The page and what it asks for: one file is upscaled at a time, by the engine of `upscale`.

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
            if not result.set_running_or_notify_cancel():
                continue
            try:
                result.set_result(task())
            except Exception as error:  # told where the result is awaited
                result.set_exception(error)

    def submit(self, task: Callable[[], Any]) -> Future[Any]:
        """Queue a task for `work`."""
        result: Future[Any] = Future()
        self.tasks.put((task, result))
        return result

    def page(self) -> str:
        """Return the page as HTML."""
        settings = {
            "networks": [{"name": name, "scale": listed.scale} for name, listed in model_list().items()],
            "bytes": _MOST_BYTES,
            "films": find_spec("av") is not None,
        }
        return page("server", settings)


@dataclass
class _Job:
    """A file to upscale, how far that is, and whether the browser still waits for it."""

    source: Path
    target: Path
    name: str  # that the browser knows it by
    size: OutputSize
    is_film: bool
    is_ensemble: bool
    done: float = 0.0
    is_wanted: bool = True

    def run(self, upscaler: Upscaler, megapixels: float) -> list[str]:
        """Do it; return the warnings of what is lost."""
        upscaler.ensemble = self.is_ensemble
        with warnings_of_this_thread() as warnings:
            try:
                if self.is_film:
                    from esc_basicsr.upscale.video import upscale_video  # which needs an extra

                    upscale_video(
                        upscaler, self.source, self.target, self.size, DEFAULT_CRF, report=self._follow
                    )
                else:
                    most = int(megapixels * 10**6)
                    upscale_file(upscaler, self.source, self.target, most_pixels=most, size=self.size)
            except UserError as error:
                raise UserError(self._named(str(error))) from error
        return [self._named(warning) for warning in warnings]

    def kind(self) -> str:
        """Give the MIME type of the result."""
        suffix = self.target.suffix
        return f"video/{suffix[1:]}" if self.is_film else f"image/{FORMATS[suffix].lower()}"

    def _follow(self, done: float, total: float | None) -> None:
        if not self.is_wanted:
            raise UserError("cancelled")
        self.done = min(done / total, 1.0) if total else 0.0

    def _named(self, text: str) -> str:
        return text.replace(str(self.target), self.name).replace(str(self.source), self.name)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _SILENCE

    def do_GET(self) -> None:
        """Send the page."""
        if self._comes_from_the_page():
            is_page = urlsplit(self.path).path == "/"
            status = HTTPStatus.OK if is_page else HTTPStatus.NOT_FOUND
            self._answer(status, self.server.page() if is_page else "no such page", "text/html")

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
            except Exception as error:  # of one image; the others are still to be done
                is_users = isinstance(error, UserError)
                status = HTTPStatus.BAD_REQUEST if is_users else HTTPStatus.INTERNAL_SERVER_ERROR
                self._answer(status, _explained(error, name))
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
        own = PurePath(query.get("name", "")).suffix.lower()
        is_film = own in VIDEO_SUFFIXES
        formats, other = (VIDEO_FORMATS, ".mkv") if is_film else (FORMATS, ".png")
        kind = own if is_film else query.get("format") or own
        suffix = kind if kind in formats else other
        with TemporaryDirectory(dir=self.server.folder) as folder:
            source, target = Path(folder, "input"), Path(folder, f"output{suffix}")
            self._receive(source, name)
            model = self.server.networks.get(query.get("network", ""))
            if model is None:
                raise UserError("this network is no longer here: choose another, or add its file again.")
            size, is_ensemble = _output_size(query.get("size", "")), bool(query.get("ensemble"))
            job = _Job(source, target, name, size, is_film, is_ensemble)
            work = self.server.submit(lambda: job.run(self.server.upscaler(model), self.server.megapixels))
            self._send_when_done(work, job)

    def _send_when_done(self, work: Future[list[str]], job: _Job) -> None:
        """Send lines of JSON: ``done`` (null while it waits), then ``error`` alone or what the file is.

        Browsers give up an answer that does not begin for minutes, and the server learns from writing whether
        the browser is still there.
        """
        try:
            self._send_headers(HTTPStatus.OK, "application/x-ndjson")
            while not wait([work], _TICK).done:
                self._send_line({"done": job.done if work.running() else None})
        except OSError:  # the browser went away
            job.is_wanted = False
            if not work.cancel():
                wait([work])
            return
        with suppress(ConnectionError, TimeoutError):
            if error := work.exception():
                self._send_line({"error": _explained(error, job.name)})
                return
            size = job.target.stat().st_size
            self._send_line({"type": job.kind(), "bytes": size, "warnings": work.result()})
            with job.target.open("rb") as file:
                shutil.copyfileobj(file, self.wfile)

    def _add_network(self, name: str, query: dict[str, str]) -> None:
        given = query.get("name", "")
        suffix = re.search(r"\.[A-Za-z0-9]{1,16}$", given)  # any other may be none for a file
        file = self.server.folder / f"network{next(self.server.numbers)}{suffix[0] if suffix else ''}"
        try:
            self._receive(file, name)
            scale = self.server.submit(lambda: self.server.upscaler(str(file)).scale).result()
        except UserError as error:
            file.unlink(missing_ok=True)
            raise UserError(str(error).replace(str(file), name)) from error
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        self.server.networks[file.name] = str(file)
        added = {"name": file.name, "title": given, "scale": scale}
        self._answer(HTTPStatus.OK, json.dumps(added), "application/json")

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

    def _answer(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        data = text.encode("utf-8", "replace")
        with suppress(ConnectionError, TimeoutError):  # the browser went away
            self._send_headers(status, f"{kind}; charset=utf-8", len(data))
            self.wfile.write(data)

    def _send_line(self, content: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(content).encode() + b"\n")

    def _send_headers(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header(
            "Content-Security-Policy", "frame-ancestors 'none'"
        )  # which a page cannot say itself
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()


def _output_size(text: str) -> OutputSize:
    if not text:
        return OutputSize()
    return OutputSize(box=read_box(text)) if "x" in text else OutputSize(outscale=read_factor(text))


def _explained(error: BaseException, name: str) -> str:
    """Say what went wrong with a file; what nobody expected goes to the terminal, too."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):  # the browser went away, or the disk is full
        return f"{name}: {error.strerror or error}"
    traceback.print_exception(error)
    return f"{name}: {'not enough memory' if is_out_of_memory(error) else repr(error)}"
