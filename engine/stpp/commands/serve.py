"""`stpp serve`: an ML backend for Label Studio that predicts brush regions. Heavy imports are deferred."""

import contextlib
import json
import threading
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stpp import __version__, config, files
from stpp.commands.options import Compute, ComputeConfig, OutputStride, ViewPx
from stpp.config import Views
from stpp.errors import UserError

if TYPE_CHECKING:
    from stpp.inference.single_images import ImagePredictor

MOST_BYTES, MOST_TASKS, MOST_LETTERS = 1 << 22, 64, 4096
"""Limits of a request: bytes, tasks, and characters of an image address."""
TIMEOUT_S = 60
"""Seconds after which an idle connection is closed."""


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve predictions for a project's images to Label Studio."""

    checkpoint: Path
    """A best.pt or third-*.pt of a run, or a published state dict."""
    root: Path
    """Folder of the images, Label Studio's document root; files outside it are never opened."""
    host: str = "127.0.0.1"
    """Address to listen on; default: this machine only. There is no password."""
    port: int = 9090
    output_stride: OutputStride = None
    view_px: ViewPx = None
    tta: Views = "none"
    max_pixels: int = 1 << 24
    """Largest accepted image; larger ones need much memory and get no mask."""
    compute: Compute = ComputeConfig()

    def __post_init__(self):
        config.check_view(self.view_px)
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port is {self.port}: it must be from 0 to 65535")


class Refused(Exception):
    """A rejected request; the message is sent to the client."""


def serve(args: Sequence[str]) -> None:
    """Runs `stpp serve` until it is stopped.

    Raises:
        UserError: missing checkpoint or folder, or an unavailable address.
    """
    options = config.parse(Serve, args, prog="stpp serve")
    if not files.and_part(options.checkpoint)[0].is_file():
        raise UserError(f"{options.checkpoint}: no such checkpoint")
    if not options.root.is_dir():
        raise UserError(f"--root {options.root}: no such folder")
    from stpp import distributed
    from stpp.inference.single_images import open_image_predictor

    with distributed.world(options.compute.device) as world:
        predictor = open_image_predictor(options.checkpoint, mode=options.tta, device=world.device,
                                         precision=options.compute.precision, max_pixels=options.max_pixels,
                                         trust=False, output_stride=options.output_stride,
                                         view_px=options.view_px)
        backend = LabelStudioBackend(predictor, options.root.resolve(), options.checkpoint.name)
        try:
            server = bound(backend, options.host, options.port)
        except OSError as error:
            raise UserError(f"--host {options.host} --port {options.port}: "
                            f"{error.strerror or error}") from None
        print(f"http://{options.host}:{server.server_port}: images below {options.root}", flush=True)
        with server, contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def bound(backend: "LabelStudioBackend", host: str, port: int) -> ThreadingHTTPServer:
    """HTTP server of a backend; port 0: any free port.

    Raises:
        OSError: the address is unavailable.
    """
    return ThreadingHTTPServer((host, port), type("BoundHandler", (_Handler,), {"backend": backend}))


class LabelStudioBackend:
    """Handlers of Label Studio's requests.

    Args:
        root: absolute image folder, without links.
        version: name of the network.
    """

    def __init__(self, predictor: "ImagePredictor", root: Path, version: str):
        from stpp.annotations.labelled import Scheme

        self._predictor, self._root, self._version = predictor, root, f"stpp {__version__} {version}"
        self._scheme, self._lock = Scheme(names=predictor.classes), threading.Lock()

    def health(self) -> dict:
        """Answer to `/health`."""
        return {"status": "UP", "model_class": "stpp"}

    def setup(self, _: dict) -> dict:
        """Answer to `/setup`."""
        return {"model_version": self._version}

    def predict(self, request: dict) -> dict:
        """Answer to `/predict`: one prediction per task.

        Raises:
            Refused: malformed request, or an image outside the root.
        """
        from stpp.annotations import to_label_studio

        tasks = request.get("tasks")
        if not isinstance(tasks, list) or not 0 < len(tasks) <= MOST_TASKS:
            raise Refused(f"expected a list `tasks` with 1 to {MOST_TASKS} entries")
        try:
            tags = to_label_studio.tags(request.get("label_config"))
        except ValueError as error:
            raise Refused(str(error)) from None
        return {"results": [self._prediction(task, *tags) for task in tasks]}

    def _prediction(self, task: Any, from_name: str, to_name: str, entry: str) -> dict:
        from stpp.annotations import to_label_studio
        from stpp.images.items import Item
        from stpp.images.pixels import BadImage

        data = task.get("data") if isinstance(task, dict) else None
        path = self._image(data.get(entry) if isinstance(data, dict) else None)
        try:
            with self._lock:  # one image at a time: it may need much memory
                item = Item(key="", source=path.name, file=str(path))
                colours_HWC, _ = self._predictor.read(item)
                mask_HW, confidence = self._predictor.scored(colours_HWC)
                mask_HW = self._predictor.as_shown(mask_HW, item)
        except BadImage as error:
            raise Refused(f"{path.name}: {error}") from None
        regions = to_label_studio.result(mask_HW, self._scheme, confidence)
        return {"model_version": self._version, "score": confidence,
                "result": [region | {"from_name": from_name, "to_name": to_name} for region in regions]}

    def _image(self, address: Any) -> Path:
        """File at a Label Studio address, or at a path relative to the root."""
        if not isinstance(address, str) or len(address) > MOST_LETTERS:
            raise Refused("a task has no image")
        before, served, named = address.partition("/local-files/?d=")
        if not served and "://" in address:
            raise Refused("only images below --root are read: serve them as local files of Label Studio")
        try:
            path = (self._root / (urllib.parse.unquote(named) if served else before).lstrip("/")).resolve()
            is_readable = path.is_relative_to(self._root) and path.is_file()
        except (OSError, ValueError):  # an impossible file name
            is_readable = False
        if not is_readable:
            raise Refused("a task names an image outside --root")
        return path


class _Handler(BaseHTTPRequestHandler):
    backend: LabelStudioBackend
    timeout = TIMEOUT_S
    server_version, sys_version = "stpp", ""

    def do_GET(self) -> None:
        known = self.path.partition("?")[0] in ("/", "/health")
        self._answer(*((200, self.backend.health()) if known else (404, {"error": "no such address"})))

    def do_POST(self) -> None:
        action = {"/setup": self.backend.setup, "/predict": self.backend.predict,
                  "/webhook": lambda _: {}}.get(self.path.partition("?")[0])
        length = self.headers.get("Content-Length", "")
        if action is None or "Origin" in self.headers:  # set by browsers, not by Label Studio
            return self._answer(403 if action else 404, {"error": "not answered"})
        if not length.isdecimal() or len(length) > 9 or int(length) > MOST_BYTES:
            return self._answer(413, {"error": f"a request must declare a length of at most {MOST_BYTES} "
                                               "bytes"})
        try:
            request = json.loads(self.rfile.read(int(length)) or b"{}")
        except (ValueError, RecursionError):
            request = None
        try:
            if not isinstance(request, dict):
                raise Refused("the request is not a JSON object")
            self._answer(200, action(request))
        except Refused as error:
            self._answer(400, {"error": str(error)})

    def _answer(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Logs nothing: image names are private."""
