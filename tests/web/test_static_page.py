"""The page without a server: what is written, and in a browser, on WebAssembly, what the network makes."""

import base64
import functools
import io
import json
import os
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from browser import find, opened
from PIL import Image, ImageOps

from esc_basicsr.__main__ import main
from esc_basicsr.data.sample_images import load_sample_image
from esc_basicsr.upscale import Upscaler
from esc_basicsr.web.static_page import TESTED_VERSION, find_runtime

# Drops files; what they become, as the browser decodes it, and the page's words.
SCRIPT = """
const given = new DataTransfer();
for (const [name, type, data] of @@files@@) {
  given.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name, {type}));
}
$("format").value = ".png";
dispatchEvent(new DragEvent("drop", {dataTransfer: given}));
while (document.querySelectorAll("li a, li .bad").length < given.items.length) {
  await new Promise(done => setTimeout(done, 20));
}
const pixels = [];
for (const link of document.querySelectorAll("li a")) {
  const image = make("img", {src: link.href});
  await image.decode();
  const canvas = make("canvas", {width: image.naturalWidth, height: image.naturalHeight});
  canvas.getContext("2d").drawImage(image, 0, 0);
  pixels.push(canvas.toDataURL().split(",")[1]);
}
const told = row => [...row.children].map(part => part.download ?? part.textContent);
const rows = [...$("list").children].map(told);
return {pixels, rows, runsOn: $("runs-on").textContent};
"""


def write_package(folder: Path, name: str = "onnxruntime-web", version: str = TESTED_VERSION) -> Path:
    """A folder that looks like the npm package."""
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": name, "version": version}))
    for part in ("", ".asyncify"):
        for ending in ("mjs", "wasm"):
            (folder / f"dist/ort-wasm-simd-threaded{part}.{ending}").write_text(f"{part}.{ending}")
    for kind in ("wasm", "webgpu"):
        (folder / f"dist/ort.{kind}.min.mjs").write_text(kind)
    return folder


def test_folder_has_all_that_the_page_names(tmp_path: Path, model: Path) -> None:
    package = write_package(tmp_path / "package")
    call = ["export", str(model), "-o", str(tmp_path / "page"), "--format", "web", "--runtime", str(package)]
    assert main(call) == 0
    page = {file.name: file.read_text("utf-8", "replace") for file in (tmp_path / "page").iterdir()}
    assert page.keys() == {
        *("index.html", "worker.js", "network.onnx", "README.txt", "ort.wasm.min.js", "ort.webgpu.min.js"),
        *("ort-wasm-simd-threaded.js", "ort-wasm-simd-threaded.wasm"),
        *("ort-wasm-simd-threaded.asyncify.js", "ort-wasm-simd-threaded.asyncify.wasm"),
    }
    assert page["ort.webgpu.min.js"] == "webgpu"
    assert "://" not in page["index.html"] + page["worker.js"]  # nothing from elsewhere
    assert f"onnxruntime-web {TESTED_VERSION}" in page["README.txt"]


def test_folder_that_exists_is_replaced_where_that_is_wished(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package, folder = write_package(tmp_path / "package"), tmp_path / "page"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    call = ["export", str(model), "-o", str(folder), "--format", "web", "--runtime", str(package)]
    assert main(call) == 2
    assert "page exists. Add --overwrite" in capsys.readouterr().err
    assert main([*call, "--overwrite"]) == 0
    assert (folder / "index.html").exists() and (folder / "mine.txt").read_text() == "mine"


def test_other_folders_are_no_runtime(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_package(tmp_path / "other", name="onnxruntime-node")
    lacking = write_package(tmp_path / "lacking", version="1.16.0")
    (lacking / "dist/ort.webgpu.min.mjs").unlink()
    for package, message in [
        (
            tmp_path / "none",
            "none is not the npm package onnxruntime-web, which runs the network. Call npm install",
        ),
        (other, "other is the npm package onnxruntime-node 1.30.0, not onnxruntime-web."),
        (lacking, "lacking is onnxruntime-web 1.16.0, which has no ort.webgpu.min.mjs."),
    ]:
        call = ["export", str(model), "-o", str(tmp_path / "page"), "--format", "web"]
        assert main([*call, "--runtime", str(package)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder on a plain web server, and its address."""
    folder = tmp_path_factory.mktemp("page")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif(find() is None, reason="no Chromium or Chrome is installed")
def test_browser_makes_what_upscale_makes(served: tuple[Path, str], model: Path, tmp_path: Path) -> None:
    package = os.environ.get("ESC_BASICSR_ONNXRUNTIME_WEB")
    if not package:
        pytest.skip("ESC_BASICSR_ONNXRUNTIME_WEB is not set to the folder of the npm package onnxruntime-web")
    folder, address = served
    call = ["export", str(model), "-o", str(folder), "--overwrite", "--format", "web", "--runtime", package]
    assert main(call) == 0
    index = folder / "index.html"
    index.write_text(index.read_text("utf-8").replace('"most": 65536', '"most": 3200'), "utf-8")
    photo = load_sample_image("chelsea")
    small, tiled = photo[:33, :42], photo[40:123, 60:151]  # in one piece; in tiles of 24
    faint = np.dstack([small, np.full(small.shape[:2], 255, np.uint8)])
    faint[5:, :, 3] = 0
    on_white = np.where(faint[..., 3:], small, 255).astype(np.uint8)
    files = [
        ("small.png", "image/png", encoded(small)),
        ("tiled.png", "image/png", encoded(tiled)),
        ("turned.jpg", "image/jpeg", encoded(small, "JPEG", exif=turned(), quality=100, subsampling=0)),
        ("faint.png", "image/png", encoded(faint)),
        ("bad.png", "image/png", base64.b64encode(b"bad").decode()),
    ]
    with opened(address, tmp_path / "profile") as page:
        seen = page.run(SCRIPT.replace("@@files@@", json.dumps(files)))
    assert seen["runsOn"] == "ESC makes images 2 times as large, on WebAssembly."
    assert [row[0] for row in seen["rows"]] == [name for name, _, _ in files]
    assert seen["rows"][-1][1] == "bad.png: the browser cannot read this image"
    assert [row[2] for row in seen["rows"][:4]] == [
        *("small_x2.png", "tiled_x2.png", "turned_x2.png", "faint_x2.png")
    ]
    results = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int) for data in seen["pixels"]
    ]
    upscale = Upscaler(model, precision="fp32")
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(base64.b64decode(files[2][2])))))
    for result, image in zip(results, (small, tiled, upright, on_white), strict=True):
        assert result.shape[:2] == (2 * image.shape[0], 2 * image.shape[1])
        assert np.abs(result[..., :3] - upscale(image)).max() <= 1
    assert seen["rows"][3][3] == "faint.png: its transparency became white."


def encoded(pixels: np.ndarray, kind: str = "PNG", **more: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **more)
    return base64.b64encode(file.getvalue()).decode()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_runtime_of_another_version_that_has_all_is_taken(tmp_path: Path) -> None:
    _, version = find_runtime(write_package(tmp_path / "package", version="1.40.2"))
    assert version == "1.40.2"
