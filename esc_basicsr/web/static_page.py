"""A folder that is a page on any web server: the network runs in the browser, by onnxruntime-web."""

import json
from pathlib import Path

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.files import check_writable, written_whole
from esc_basicsr.common.version import __version__
from esc_basicsr.fast.tiles import grid_of
from esc_basicsr.upscale.upscaler import BORDER
from esc_basicsr.web.page import page, resource
from esc_basicsr.weights.shipped import TrainedNetwork

RUNTIME = "onnxruntime-web"
TESTED_VERSION = "1.30.0"
_MOST_PIXELS = 2**16  # at a time, of LR: a browser takes 1 GB for them by ESC, and WebAssembly has 4
# What runs on WebAssembly, then what on WebGPU.
_RUNTIME_FILES = (
    *("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    *("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
)
_README = """\
A page that makes images larger in the browser, by {title}. Images stay on the visitor's device.

To try it, call

    python -m http.server --bind 127.0.0.1

in this folder and open http://127.0.0.1:8000. To publish it, put the folder on any web server; nothing runs
there. Opened as a file it does not work: browsers load neither workers nor WebAssembly from files.

index.html, worker.js   the page, written by esc_basicsr {version}
network.onnx            the network: {title}, x{scale}
ort*                    Microsoft's onnxruntime-web {runtime} (MIT licence), from npm; its *.mjs
                        became *.js, as not every web server knows that *.mjs are scripts. Browsers load
                        what they need: the files of WebGPU, or those of WebAssembly.

On WebAssembly it is faster by several threads, which browsers allow to pages that are sent with the headers
"Cross-Origin-Opener-Policy: same-origin" and "Cross-Origin-Embedder-Policy: require-corp".
"""


def find_runtime(package: Path) -> tuple[dict[str, Path], str]:
    """Find the files of onnxruntime-web that a page needs.

    Args:
        package: The folder of the npm package.

    Returns:
        The files by the names that the page has for them, and the package's version.

    Raises:
        UserError: It is another folder, or the package of another version that lacks some.
    """
    advice = f"Call npm install {RUNTIME}@{TESTED_VERSION}, and name node_modules/{RUNTIME} with --runtime."
    try:
        about = json.loads((package / "package.json").read_text("utf-8"))
        name, version = str(about["name"]), str(about["version"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{package} is not the npm package {RUNTIME}, which runs the network. {advice}"
        ) from None
    files = {file.replace(".mjs", ".js"): package / "dist" / file for file in _RUNTIME_FILES}
    missing = [path.name for path in files.values() if not path.is_file()]
    if name != RUNTIME:
        raise UserError(f"{package} is the npm package {name} {version}, not {RUNTIME}. {advice}")
    if missing:
        raise UserError(f"{package} is {name} {version}, which has no {', '.join(missing)}. {advice}")
    return files, version


def write_page(folder: Path, network: bytes, trained: TrainedNetwork, runtime: Path) -> None:
    """Write the page, the network, and what runs it.

    Args:
        folder: Where to; its files of the same names are replaced.
        network: The network as ONNX.
        trained: The same, of which the page names and scale are told.
        runtime: The folder of the npm package onnxruntime-web.

    Raises:
        UserError: ``runtime`` is another folder; or the files cannot be written.
    """
    files, version = find_runtime(runtime)
    title = trained.variant or str(trained.options["type"])
    settings = {
        "title": title,
        "scale": trained.scale,
        "window": grid_of(trained.network, trained.options),
        "border": BORDER,
        "most": _MOST_PIXELS,
    }
    about = {"title": title, "scale": trained.scale, "runtime": version, "version": __version__}
    contents = {
        **{name: path.read_bytes() for name, path in files.items()},
        "network.onnx": network,
        "worker.js": resource("worker.js").encode(),
        "README.txt": _README.format(**about).encode(),
        "index.html": page("browser", settings).encode(),  # last: without it there is no page
    }
    check_writable(folder)
    for name, content in contents.items():
        with written_whole(folder / name) as file:
            file.write(content)
