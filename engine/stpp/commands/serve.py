"""`stpp serve`: Label Studio's ML backend, which answers with brushes. Nothing heavy is imported before it
runs."""

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
from stpp.commands.options import Compute, ComputeConfig, OutputStride
from stpp.config import Views
from stpp.errors import UserError

if TYPE_CHECKING:
    from stpp.inference.single_images import ImagePredictor

MOST_BYTES, MOST_TASKS, MOST_LETTERS = 1 << 22, 64, 4096
"""Of a request; the last of an image's address."""
TIMEOUT_S = 60
"""How long a client may keep a connection without a word."""


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Answer Label Studio's requests for predictions of a project's images."""

    checkpoint: Path
    """A best.pt or third-*.pt of a run, or a published state dict."""
    root: Path
    """Folder of the images, Label Studio's document root; nothing outside it is opened."""
    host: str = "127.0.0.1"
    """Address to listen at; the default is this machine alone. There is no password."""
    port: int = 9090
    output_stride: OutputStride = None
    tta: Views = "none"
    max_pixels: int = 1 << 24
    """Images of more pixels get no mask: they need much memory."""
    compute: Compute = ComputeConfig()


class Refused(Exception):
    """A request that is not answered; the text is for the client."""


def serve(args: Sequence[str]) -> None:
    """Runs `stpp serve` until it is stopped.

    Raises:
        UserError: no checkpoint or folder, or the address cannot be listened at.
    """
    options = config.parse(Serve, args, prog="stpp serve")
    if not files.and_part(options.checkpoint)[0].is_file():
        raise UserError(f"{options.checkpoint}: there is no such checkpoint")
    if not options.root.is_dir():
        raise UserError(f"--root {options.root}: there is no such folder")
    from stpp import distributed
    from stpp.inference.single_images import open_image_predictor

    with distributed.world(options.compute.device) as here:
        predictor = open_image_predictor(options.checkpoint, mode=options.tta, device=here.device,
                                         precision=options.compute.precision, max_pixels=options.max_pixels,
                                         trust=False, output_stride=options.output_stride)
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
    """A server that answers with a backend; port 0: a free one.

    Raises:
        OSError: the address cannot be listened at.
    """
    return ThreadingHTTPServer((host, port), type("BoundHandler", (_Handler,), {"backend": backend}))


class LabelStudioBackend:
    """What the requests ask for.

    Args:
        root: absolute, without links.
        version: name of the network.
    """

    def __init__(self, predictor: "ImagePredictor", root: Path, version: str):
        from stpp.annotations.labelled import Scheme

        self._predictor, self._root, self._version = predictor, root, f"stpp {__version__} {version}"
        self._scheme, self._lock = Scheme(names=predictor.classes), threading.Lock()

    def health(self) -> dict:
        """The answer of `/health`."""
        return {"status": "UP", "model_class": "stpp"}

    def setup(self, _: dict) -> dict:
        """The answer of `/setup`."""
        return {"model_version": self._version}

    def predict(self, request: dict) -> dict:
        """The answer of `/predict`: a prediction for each task.

        Raises:
            Refused: it is no such request, or names an image that is not below the root.
        """
        from stpp.annotations import to_label_studio

        tasks = request.get("tasks")
        if not isinstance(tasks, list) or not 0 < len(tasks) <= MOST_TASKS:
            raise Refused(f"expected a list `tasks` of 1 to {MOST_TASKS}")
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
                colours_HWC, _ = self._predictor.read(Item(key="", source=path.name, file=str(path)))
                mask_HW, confidence = self._predictor.scored(colours_HWC)
        except BadImage as error:
            raise Refused(f"{path.name}: {error}") from None
        regions = to_label_studio.result(mask_HW, self._scheme, confidence)
        return {"model_version": self._version, "score": confidence,
                "result": [one | {"from_name": from_name, "to_name": to_name} for one in regions]}

    def _image(self, address: Any) -> Path:
        """The file that Label Studio serves at an address, or that a path from the root names."""
        if not isinstance(address, str) or len(address) > MOST_LETTERS:
            raise Refused("a task has no image")
        before, served, named = address.partition("/local-files/?d=")
        if not served and "://" in address:
            raise Refused("images are read from --root alone: serve them as local files of Label Studio")
        try:
            path = (self._root / urllib.parse.unquote(named if served else before).lstrip("/")).resolve()
            there = path.is_relative_to(self._root) and path.is_file()
        except (OSError, ValueError):  # a name that no file can have
            there = False
        if not there:
            raise Refused("a task names an image that is not below --root")
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
        if action is None or "Origin" in self.headers:  # an origin: a page in a browser, not Label Studio
            return self._answer(403 if action else 404, {"error": "not answered"})
        if not length.isdecimal() or len(length) > 9 or int(length) > MOST_BYTES:
            return self._answer(413, {"error": f"a request says its length, at most {MOST_BYTES} bytes"})
        try:
            request = json.loads(self.rfile.read(int(length)) or b"{}")
        except (ValueError, RecursionError):
            request = None
        try:
            if not isinstance(request, dict):
                raise Refused("the request is no JSON object")
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
        """Says nothing: names of images belong to the user."""
