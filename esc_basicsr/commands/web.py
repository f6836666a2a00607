"""Upscale images and films on a page in the browser, on this computer alone.

Drop images on it, choose how much larger, compare before and after, download. It is served at 127.0.0.1 only
and loads nothing from elsewhere; images stay on this computer. Ctrl+C ends it.

  python -m esc_basicsr web
"""

import argparse
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

from esc_basicsr.common.errors import UserError
from esc_basicsr.common.signals import watched_for
from esc_basicsr.web.server import Server
from esc_basicsr.weights.shipped import default_model


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
