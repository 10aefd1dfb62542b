"""A model behind HTTP, on Ray Serve: a page to drop photographs on, and the endpoint that the page calls.

GET /          the page
GET /health    {"status": "ok", "model": ..., "num_classes": K}
POST /predict  body: the bytes of one photograph. The answer is JSON:
               {"width": px, "height": px, "mask": palette PNG of class ids as a data: URL (RGB above 256 classes),
                "classes": [{"id", "name", "kind", "colour", "share": 0-1}, ...]}, classes in the mask, largest first,
               or {"error": one sentence}, with 413 (too large), 415 (not a photograph) or 422 (damaged).
"""

import asyncio
import base64
import importlib
import json
import socket
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from transfgu_ray.engine.logs import divert_ray_loggers
from transfgu_ray.engine.session import WORKER_CPUS, Resources
from transfgu_ray.errors import ConfigError
from transfgu_ray.images import EXTENSIONS, ImageRefused, NotAnImage, TooManyPixels, decode_rgb, encode
from transfgu_ray.models.model import load_model
from transfgu_ray.models.names import load_names
from transfgu_ray.reports.legend import legend
from transfgu_ray.reports.page import render
from transfgu_ray.reports.palette import class_colours, palette_image
from transfgu_ray.storage import Folder

# Photographs in memory at once, and those that wait; for others the server is busy.
_AT_ONCE = 2
_WAITING = 16
_NAME = "transfgu"
_KINDS = "JPEG, PNG, WebP, BMP or TIFF"
# The page is one file: nothing from elsewhere may run.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Limits:
    """Largest photograph that is accepted.

    Attributes:
        max_megabytes: size of the file, millions of bytes.
        max_megapixels: size of the photograph, millions of pixels.
    """

    max_megabytes: float = 25
    max_megapixels: float = 50


class _Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class PhotoServer:
    """The deployment: a model and the page.

    Photographs are not batched: the last bits of a matrix product depend on its shape, so a mask would depend on other
    requests at the same moment.
    """

    def __init__(self, model_uri: str, name: str, *, limits: Limits, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        _keep_to_loopback()
        self._model = load_model(Folder(model_uri), device)
        self._name, self._limits = name, limits
        self._names = load_names(Folder(model_uri), self._model.config.kinds)
        self._legend = legend(self._names)
        self._colours = class_colours(self._names.num_classes, self._names.background_id)
        self._page = render(
            "serve.html",
            name=name,
            num_classes=len(self._legend),
            accept=",".join(EXTENSIONS),
            max_megapixels=f"{limits.max_megapixels:g}",
            max_megabytes=f"{limits.max_megabytes:g}",
        )

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        try:
            match (request.method, request.url.path):
                case ("GET" | "HEAD", "/"):
                    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
                    return Response(self._page, media_type="text/html", headers=headers)
                case ("GET" | "HEAD", "/health"):
                    return JSONResponse({"status": "ok", "model": self._name, "num_classes": len(self._legend)})
                case ("POST", "/predict"):
                    data = await self._read(request)
                    return Response(await asyncio.to_thread(self._segment, data), media_type="application/json")
                case (_, "/" | "/health" | "/predict"):
                    raise _Refusal(
                        405, "GET / is the page, GET /health the server's state, and POST /predict takes a photograph."
                    )
                case _:
                    raise _Refusal(404, f"There is no {request.url.path}; the page is /, photographs go to /predict.")
        except _Refusal as refusal:
            return JSONResponse({"error": str(refusal)}, refusal.status)

    async def _read(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise _Refusal(
                415, "Send the bytes of the photograph alone, as `curl --data-binary @photo.jpg` does, not a form."
            )
        most = int(self._limits.max_megabytes * 1e6)
        data = bytearray()
        if int(request.headers.get("content-length", 0)) <= most:
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    break
            else:
                return bytes(data)
        raise _Refusal(413, f"The file is too large; at most {self._limits.max_megabytes:g} MB are accepted.")

    def _segment(self, data: bytes) -> bytes:
        most = self._limits.max_megapixels
        try:
            photo = decode_rgb(data, 1, int(most * 1e6), self._model.config.bands)
        except TooManyPixels:
            raise _Refusal(413, f"The photograph is too large; at most {most:g} megapixels are accepted.") from None
        except NotAnImage:
            raise _Refusal(415, f"This is not a photograph; {_KINDS} files are accepted.") from None
        except ImageRefused as refusal:
            raise _Refusal(422, f"The photograph cannot be read: {refusal}.") from None
        (mask,) = self._model.segment([photo])
        mask = self._names.apply(mask)
        share = np.bincount(mask.ravel(), minlength=self._names.num_classes) / mask.size
        classes = [entry | {"share": share[entry["id"]]} for entry in self._legend if share[entry["id"]]]
        answer = {
            "width": photo.width,
            "height": photo.height,
            "mask": self._data_url(mask),
            "classes": sorted(classes, key=lambda entry: -entry["share"]),
        }
        return json.dumps(answer).encode()

    def _data_url(self, mask: np.ndarray) -> str:
        is_palette = len(self._colours) <= 256
        image = palette_image(mask, self._colours) if is_palette else Image.fromarray(self._colours[mask])
        return f"data:image/png;base64,{base64.b64encode(encode(image, 'PNG')).decode()}"


def _keep_to_loopback() -> None:
    """Make the port that other replicas call listen on loopback alone; call it before the replica opens the port.

    Ray Serve opens it on all interfaces, accepts pickled calls there, and has no setting for it.
    """
    replica: Any = importlib.import_module("ray.serve._private.replica")
    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))


def start(model: Folder, name: str, *, host: str, port: int, limits: Limits, resources: Resources) -> str:
    """Serve a model for as long as this process is connected to its local Ray; return the URL of the page.

    Args:
        model: folder of the model.
        name: name of the model on the page.
        host: address to listen on.
        port: port to listen on.
        limits: largest photograph that is accepted.
        resources: resources of the local Ray.

    Raises:
        TransfguError: the model cannot be loaded.
    """
    # Loaded here first: errors would be lost among the restarts of a deployment.
    load_model(model)
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    divert_ray_loggers()
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=quiet)
    deployment: Any = serve.deployment(
        PhotoServer,
        name=_NAME,
        max_ongoing_requests=_AT_ONCE,
        max_queued_requests=_WAITING,
        ray_actor_options={"num_cpus": WORKER_CPUS, "num_gpus": resources.gpus_per_worker},
        logging_config=quiet,
    )
    application = deployment.bind(model.uri, name, limits=limits, device=resources.device, threads=resources.threads)
    serve.run(application, name=_NAME, route_prefix="/")
    return f"http://{host}:{port}"


def require_free(host: str, port: int) -> None:
    """Refuse an address that this process cannot listen on.

    Raises:
        ConfigError: it cannot listen there.
    """
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        # Python appends the address in brackets.
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise ConfigError(
            f"cannot listen on --host {host} --port {port}: {reason}; give another port or an address of this machine"
        ) from None
