"""The page that a server on this computer shows: by HTTP, and in a browser where there is one."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlencode

import imagecodecs
import numpy as np
import pytest
from browser import find, opened
from fixtures.films import frames_of, moving, packets_of
from PIL import Image

from esc_basicsr.__main__ import main
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.upscale import Upscaler
from esc_basicsr.upscale.output_size import reduced
from esc_basicsr.web import server as web

PHOTO = load_sample_image("chelsea")[:20, :30]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[web.Server]:
    """The page's server, on a free port, for images of up to 1,000 pixels."""
    (tmp_path / "sent").mkdir()
    with web.Server(0, tmp_path / "sent", megapixels=0.001) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        Thread(target=server.work, daemon=True).start()
        yield server
        server.shutdown()
        thread.join()


def encoded(pixels: np.ndarray = PHOTO, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def ask(
    server: web.Server,
    path: str,
    data: bytes | None = None,
    headers: dict[str, str] | None = None,
    **query: str,
) -> tuple[int, bytes, str]:
    """The status, content and type of the answer."""
    address = f"{server.address}{path}?{urlencode(query)}"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers or {})) as answer:
            return answer.status, answer.read(), answer.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers["Content-Type"]


def enlarge(server: web.Server, data: bytes, **query: str) -> tuple[dict[str, Any], bytes]:
    """Send an image or a film; the last line of the answer, and what follows it."""
    status, content, kind = ask(server, "/image", data, **query)
    assert (status, kind) == (200, "application/x-ndjson")
    while True:
        line, _, content = content.partition(b"\n")
        if "done" not in (note := json.loads(line)):
            return note, content


def add(server: web.Server, model: Path) -> str:
    """Send a network's file; the name that the page has for it."""
    status, content, _ = ask(server, "/network", model.read_bytes(), name="my net.pth")
    added = json.loads(content)
    assert (status, added["title"], added["scale"]) == (200, "my net.pth", 2)
    return added["name"]


def test_image_comes_back_as_upscale_makes_it(server: web.Server, model: Path) -> None:
    network = add(server, model)
    note, content = enlarge(server, encoded(), name="cat.png", network=network)
    assert note == {"type": "image/png", "bytes": len(content), "warnings": []}
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(np.asarray(image), Upscaler(model)(PHOTO))
    assert [path.name for path in server.folder.iterdir()] == [network]


@pytest.mark.parametrize(
    ("name", "wanted", "expected"),
    [
        ("cat.JPG", "", "jpeg"),
        ("cat.jpg", ".png", "png"),
        ("cat.bmp", "", "png"),
        ("cat", ".webp", "webp"),
        ("at 9\u202fPM.jpg", "", "jpeg"),
        (f"{'long' * 60}.jpg", "", "jpeg"),
    ],
)
def test_format_is_the_image_s_own_or_the_chosen_one(
    server: web.Server, model: Path, name: str, wanted: str, expected: str
) -> None:
    data = encoded(kind="BMP" if name.endswith("bmp") else "JPEG")
    note, content = enlarge(server, data, name=name, network=add(server, model), format=wanted)
    assert note["type"] == f"image/{expected}"
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size) == (expected.upper(), (60, 40))


def test_what_is_wrong_with_an_image_or_a_network_is_said_by_its_name(
    server: web.Server, model: Path
) -> None:
    network = add(server, model)
    transparent = encoded(np.dstack([PHOTO, PHOTO[..., 0]]))
    sent = {"name": "a.png", "network": network}
    for data, query, message in [
        (encoded()[:300], {"name": "half.png"}, "half.png cannot be decoded"),
        (b"no image", {"name": "a.png"}, "a.png cannot be decoded as an image"),
        (encoded(np.zeros((40, 40), np.uint8)), {"name": "big.png"}, "big.png has more than 1,000 pixels"),
        (transparent, {"format": ".jpg"}, "a.png: JPEG holds no transparency"),
        (
            encoded(),
            {"size": "2.5"},
            "a.png: 30 × 20 pixels would be enlarged ×2.5, and the network makes ×2",
        ),
        (encoded(), {"size": "20x20"}, "a.png: 30 × 20 pixels are larger than the result is to be"),
    ]:
        error = enlarge(server, data, **sent | query)[0]["error"]
        assert message in error and str(server.folder) not in error
    for data, query, message in [
        (b"", {"name": "none.png"}, "none.png: a file of 1 byte to 512 MiB is expected"),
        (encoded(), {"network": "/etc/passwd"}, "this network is no longer here"),
        (encoded(), {"size": "1e999999999"}, "expected a number such as 3.5"),
        (encoded(), {"size": "0x0"}, "expected width and height such as 3840x2160"),
    ]:
        status, content, kind = ask(server, "/image", data, **sent | query)
        assert (status, kind) == (400, "text/plain; charset=utf-8")
        assert content.decode().startswith(message)
    status, content, _ = ask(server, "/network", b"no weights", name="odd.pth")
    assert status == 400 and content.decode().startswith("odd.pth: not a PyTorch checkpoint")
    assert [path.name for path in server.folder.iterdir()] == [network]


def test_size_and_ensemble_are_what_they_are_in_python(server: web.Server, model: Path) -> None:
    network = add(server, model)
    once, averaged = Upscaler(model)(PHOTO), Upscaler(model, ensemble=True)(PHOTO)
    assert (once != averaged).any()
    for query, expected in [
        ({"size": "1.5"}, reduced(once, (30, 45))),
        ({"size": "50x100"}, reduced(once, (33, 50))),
        ({"ensemble": "1"}, averaged),
        ({}, once),
    ]:
        _, content = enlarge(server, encoded(), name="cat.png", network=network, **query)
        with Image.open(io.BytesIO(content)) as image:
            np.testing.assert_array_equal(np.asarray(image), expected)


def test_what_is_lost_of_an_image_is_told_by_its_name(
    server: web.Server, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    deep = imagecodecs.png_encode(PHOTO.astype(np.uint16) * 257)
    note, _ = enlarge(server, deep, name="deep.png", network=add(server, model), format=".jpg")
    assert [warning.startswith("deep.png") for warning in note["warnings"]] == [True]
    assert "16" in note["warnings"][0] and not capfd.readouterr().err


def test_film_comes_back_with_its_sound(
    server: web.Server, model: Path, tmp_path: Path, make_film: Callable[..., Path]
) -> None:
    film = make_film(tmp_path / "film.mp4", moving(3))
    network = add(server, model)
    note, content = enlarge(server, film.read_bytes(), name="film.MP4", network=network, format=".png")
    assert (note["type"], note["bytes"]) == ("video/mp4", len(content))
    (large := tmp_path / "large.mp4").write_bytes(content)
    assert [frame.shape for frame in frames_of(large)] == [(48, 64, 3)] * 3
    assert packets_of(large, "audio") == packets_of(film, "audio")
    assert [path.name for path in server.folder.iterdir()] == [network]


def test_browser_that_goes_away_cancels_its_film(
    server: web.Server,
    model: Path,
    tmp_path: Path,
    make_film: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = add(server, model)
    frames: list[np.ndarray] = []

    def slowly(pixels: np.ndarray) -> np.ndarray:
        frames.append(pixels)
        time.sleep(0.05)
        return pixels.repeat(2, 0).repeat(2, 1)

    slowly.scale, slowly.name, slowly.precision, slowly.ensemble = 2, str(model), "fp32", False
    monkeypatch.setattr(server, "upscaler", lambda _: slowly)
    monkeypatch.setattr(web, "_TICK", 0.02)
    film = make_film(tmp_path / "film.mkv", moving(150), is_silent=True).read_bytes()
    head = (
        f"POST /image?name=film.mkv&network={network} HTTP/1.1\r\nHost: {web.HOST}:{server.server_port}\r\n"
    )
    with socket.create_connection((web.HOST, server.server_port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(film)}\r\n\r\n".encode() + film)
        with connection.makefile("rb") as answer:
            while not answer.readline().startswith(b'{"done": 0.'):
                pass
    while len([*server.folder.iterdir()]) > 1:  # until what was sent is gone
        time.sleep(0.02)
    assert 0 < len(frames) < 150


def test_network_is_named_as_its_file_is(server: web.Server, model: Path) -> None:
    for name in ("at 9\u202fPM.pth", "n" * 240 + ".pth", "of.\0"):
        status, content, _ = ask(server, "/network", model.read_bytes(), name=name)
        assert (status, json.loads(content)["title"]) == (200, name)


def test_network_that_fails_leaves_nothing(
    server: web.Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> None:
        raise MemoryError

    monkeypatch.setattr(server, "upscaler", fail)
    assert ask(server, "/network", model.read_bytes(), name="a.pth")[0] == 500
    assert not [*server.folder.iterdir()]


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (2**29 + 1, b"a file of 1 byte to 512 MiB is expected"),
        (100, b"did not arrive whole"),
        (-1, b"1 byte"),
    ],
)
def test_file_that_is_too_large_or_breaks_off_is_refused(
    server: web.Server, length: int, message: bytes
) -> None:
    head = (
        f"POST /image HTTP/1.1\r\nHost: {web.HOST}:{server.server_port}\r\nContent-Length: {length}\r\n\r\n"
    )
    with socket.create_connection((web.HOST, server.server_port)) as connection:
        connection.sendall(head.encode())
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.0 400 ") and message in answer
    assert not [*server.folder.iterdir()]


def test_more_images_than_may_wait_are_turned_away(server: web.Server) -> None:
    while server.places.acquire(blocking=False):
        pass
    large = bytes(2**24)  # more than a connection holds: it is read before it is answered
    status, content, _ = ask(server, "/image", large, name="a.png")
    assert (status, content) == (503, b"8 images are in work or waiting: try again later.")


def test_other_sites_are_refused(server: web.Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    for headers in ({"Host": "example.org"}, {"Origin": "http://example.org"}, {"Origin": "null"}):
        for data in (None, encoded()):
            status, content, _ = ask(server, "/image" if data else "/", data, headers)
            assert (status, content.decode()) == (403, f"open {server.address} instead")


@pytest.mark.parametrize(
    "path", ["/../server.py", "//etc/passwd", "/..%2f..%2fetc/passwd", "/image", "/page.css"]
)
def test_no_file_is_given_away(server: web.Server, path: str) -> None:
    with socket.create_connection((web.HOST, server.server_port)) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost:{server.server_port}\r\n\r\n".encode())
        head, _, content = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 404 ") and content == b"no such page"


def test_names_lead_nowhere(server: web.Server, model: Path, tmp_path: Path) -> None:
    before = {*tmp_path.iterdir()}
    for name in ("../../out.png", "/etc/x.png", "a\0.png"):
        note, _ = enlarge(server, encoded(), name=name, network=add(server, model), format="/../../x.png")
        assert note["type"] == "image/png"
    assert {*tmp_path.iterdir()} == before


def test_browser_that_stops_sending_is_given_up(server: web.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web._Handler, "timeout", 0.1)
    with socket.create_connection((web.HOST, server.server_port)) as connection:
        head = f"POST /image HTTP/1.1\r\nHost: {web.HOST}:{server.server_port}\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\nhalf".encode())
        assert connection.makefile("rb").read().startswith(b"HTTP/1.0 500 ")
    assert not [*server.folder.iterdir()]


def test_page_refers_to_nothing_outside(server: web.Server) -> None:
    status, content, kind = ask(server, "/")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert b"default-src 'none'; " in content
    with urllib.request.urlopen(server.address) as answer:
        assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert not re.search(rb"https?:|//[a-z]+\.|@import|@font-face", content)
    assert {b'"ESC-light_x2"', b'"ESC-light_x4"'} <= set(re.findall(rb'"ESC[^"]*"', content))
    assert ask(server, "/other")[0] == 404


def test_mistakes_in_the_terminal_are_one_message(
    server: web.Server, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in [
        (["--port", str(server.server_port)], f"error: port {server.server_port}: Address already in use."),
        (["--port", "70000"], "error: --port must be from 0 to 65535"),
        (["--port", "0", "--max-megapixels", "0"], "error: --max-megapixels must be above 0"),
        (["--port", "0", "--device", "abacus"], "error: device 'abacus' is not available"),
    ]:
        assert main(["web", *arguments]) == 2
        assert capsys.readouterr().err.startswith(message)


@pytest.mark.slow
def test_interrupt_ends_the_command_cleanly_even_at_work(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "esc_basicsr", "web", "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        try:
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())[1])
            data = encoded(load_sample_image("chelsea"))
            head = f"POST /image?network=ESC-light_x2 HTTP/1.1\r\nHost: localhost:{port}\r\n"
            with socket.create_connection((web.HOST, port)) as connection:
                connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
                while not any(path.stat().st_size == len(data) for path in tmp_path.rglob("input")):
                    time.sleep(0.01)
                time.sleep(0.3)  # into the network; the test holds, too, where it is not there yet
                process.send_signal(signal.SIGINT)
                assert (process.wait(60), process.stderr.read()) == (0, "")
                answer = connection.makefile("rb").read()
                assert answer.startswith(b"HTTP/1.0 200 ") and b'"type"' not in answer  # no image came
        finally:
            process.kill()
    assert not [*tmp_path.glob("esc_basicsr_web_*")]


# Adds a network of ours; drops a whole image and a broken one; then one with 16 bits that becomes JPEG of
# another size, one that is cancelled at once, and one that is while it waits.
SCRIPT = """
const file = (name, data) => new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name);
const given = (...files) => files.reduce((all, one) => (all.items.add(one), all), new DataTransfer());
const until = async found => { while (!found()) await new Promise(done => setTimeout(done, 20)); };
$("weights").files = given(file("my net.pth", "@@model@@")).files;
$("weights").dispatchEvent(new Event("change"));
await until(() => $("network").value.startsWith("network"));
const drop = (...files) => dispatchEvent(new DragEvent("drop", {dataTransfer: given(...files)}));
drop(file("cat.png", "@@image@@"), file("bad.png", "AAAA"));
await until(() => document.querySelector("progress"));
const progress = document.querySelector("li span").textContent;
await until(() => document.querySelector("li .bad") && $("after").naturalWidth);
$("at").value = 25;
$("at").dispatchEvent(new Event("input"));
const sizes = [$("before"), $("after")].map(image => image.naturalWidth);
document.querySelector("input[value=other]").click();
drop(file("no size.png", "@@image@@"));
const called = [], {upscale} = engine;
engine.upscale = (file, ...more) => (called.push(file.name), upscale(file, ...more));
$("size").value = "1,5";
$("format").value = ".jpg";
const cancelLast = () => [...document.querySelectorAll("li button.act")].at(-1).click();
drop(file("early.png", "@@image@@"));
cancelLast();
drop(file("deep.png", "@@deep@@"), file("never.png", "@@image@@"));
cancelLast();
await until(() => document.querySelectorAll("li a").length === 2);
await until(() => $("after").naturalWidth === 45);
return {
  progress, sizes, called, note: $("network-note").textContent,
  at: $("compare").style.getPropertyValue("--at"),
  rows: [...$("list").children].map(row => [...row.children].map(part => part.download ?? part.textContent)),
};
"""


@pytest.mark.slow
@pytest.mark.skipif(find() is None, reason="no Chromium or Chrome is installed")
def test_in_a_browser_images_are_dropped_compared_and_downloaded(
    server: web.Server, model: Path, tmp_path: Path
) -> None:
    script = SCRIPT
    deep = imagecodecs.png_encode(PHOTO.astype(np.uint16) * 257)
    for name, data in (("model", model.read_bytes()), ("image", encoded()), ("deep", deep)):
        script = script.replace(f"@@{name}@@", base64.b64encode(data).decode())
    with opened(server.address, tmp_path / "profile") as page:
        seen = page.run(script)
    assert seen["progress"].startswith("Working, ")
    assert (seen["sizes"], seen["at"]) == ([30, 60], "25%")  # before and after
    assert seen["note"] == "my net.pth makes images 2 times as large."
    cat, bad, early, (name, status, link, warning), never = seen["rows"]
    assert re.fullmatch(r"Done: 30 × 20 to 60 × 40, \d+\.\d s", cat[1]) and cat[2] == "cat_x2.png"
    assert bad[0] == "bad.png" and bad[1].startswith("bad.png cannot be decoded")
    assert name == "deep.png" and status.startswith("Done: 30 × 20 to 45 × 30, ")
    assert link == "deep_x1.5.jpg" and warning.startswith("deep.png") and "16" in warning
    assert (early, never) == (["early.png", "Cancelled"], ["never.png", "Cancelled"])
    assert seen["called"] == ["deep.png"]
