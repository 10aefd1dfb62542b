"""The page and the endpoint of `transfgu serve`, as a browser and a script meet them."""

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image

from tests.builders import make_folder
from tests.fixtures import transfgu
from tests.reports.chromium import CHROMIUM, new_page
from transfgu_ray.errors import ConfigError
from transfgu_ray.models.model import load_model
from transfgu_ray.reports.page import hex_colour
from transfgu_ray.runs.run import Run
from transfgu_ray.serving.serve import require_free
from transfgu_ray.storage import Folder

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class Served:
    process: subprocess.Popen[str]
    url: str


@pytest.fixture(scope="module")
def served(finished: Run) -> Iterator[Served]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    limits = ("--max-megabytes", "0.2", "--max-megapixels", "0.5")
    process = transfgu("serve", finished.folder.uri, "--port", str(port), *limits)
    said = ""
    for line in process.stdout:
        said += line
        if line == "Ctrl-C ends it\n":
            break
    found = re.search(r"is served on (\S+);", said)
    assert found, said
    try:
        yield Served(process, found[1])
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
        assert (process.returncode, rest) == (0, "stopped\n")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def ask(url: str, data: bytes | None = None, **headers: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(tmp_path: Path) -> Image.Image:
    return Image.open(make_folder(tmp_path, num_images=1) / "photo_000.jpg").convert("RGB")


def test_predict__the_mask_is_the_models_upright_with_its_classes(
    served: Served, finished: Run, tmp_path: Path
) -> None:
    picture = photo(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    status, answer = ask(f"{served.url}/predict", encoded(turned, "PNG", exif=exif))
    assert (status, answer["width"], answer["height"]) == (200, *picture.size)
    kind, _, data = answer["mask"].partition(",")
    mask = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (kind, mask.mode) == ("data:image/png;base64", "P")
    (expected,) = load_model(Folder(finished.folder.uri_of("model"))).segment([picture])
    np.testing.assert_array_equal(np.asarray(mask), expected)
    shares = {entry["id"]: entry["share"] for entry in answer["classes"]}
    assert shares == {class_id: np.mean(expected == class_id) for class_id in np.unique(expected)}
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    colours = {entry["id"]: entry["colour"] for entry in answer["classes"]}
    for class_id, colour in colours.items():
        row, column = np.argwhere(expected == class_id)[0]
        assert hex_colour(mask.convert("RGB").getpixel((int(column), int(row)))) == colour


def test_health__names_the_model(served: Served) -> None:
    assert ask(f"{served.url}/health") == (200, {"status": "ok", "model": "run", "num_classes": 5})


@pytest.mark.parametrize(
    ("path", "data", "status", "words"),
    [
        ("/predict", b"hello", 415, "This is not a photograph; JPEG, PNG"),
        ("/predict", encoded(Image.new("RGB", (20, 20)), "GIF"), 415, "This is not a photograph"),
        ("/predict", encoded(Image.effect_noise((200, 200), 90), "PNG")[:9000], 422, "cannot be read: damaged"),
        ("/predict", b"", 422, "empty file"),
        ("/predict", bytes(300_000), 413, "at most 0.2 MB are accepted"),
        ("/predict", encoded(Image.new("L", (800, 800)), "PNG"), 413, "at most 0.5 megapixels are accepted"),
        ("/predict", None, 405, "POST /predict takes a photograph"),
        ("/elsewhere", None, 404, "There is no /elsewhere"),
    ],
    ids=["text", "gif", "cut", "empty", "bytes", "pixels", "method", "path"],
)
def test_endpoint__refuses_in_one_sentence(
    path: str, data: bytes | None, status: int, words: str, served: Served
) -> None:
    found, answer = ask(f"{served.url}{path}", data)
    assert found == status
    assert words in answer["error"]
    assert set(answer) == {"error"}


def test_endpoint__counts_the_bytes_of_a_body_of_unknown_length(served: Served) -> None:
    connection = HTTPConnection(served.url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    # Nothing after the first byte too many: the server closes, and what is still sent would break the connection.
    for _ in range(201):
        connection.send(b"3e8\r\n" + bytes(1000) + b"\r\n")
    assert connection.getresponse().status == 413
    connection.close()


def test_endpoint__refuses_a_form(served: Served) -> None:
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    status, answer = ask(f"{served.url}/predict", b"--x--", **form)
    assert status == 415
    assert "--data-binary" in answer["error"]


def test_serve__listens_on_loopback_alone(served: Served) -> None:
    # psutil comes with Ray.
    assert ray
    import psutil

    main = psutil.Process(served.process.pid)
    processes = [main, *main.children(recursive=True)]
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(processes) > 4
    assert listening == {"127.0.0.1"}


def test_require_free__refuses_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port {port}: Address already in use; give another port"):
            require_free("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"--host no\.such\.host"):
        require_free("no.such.host", port)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("size", [(390, 844), (1440, 900)], ids=["telephone", "desk"])
def test_page__shows_the_masks_of_a_real_photograph(
    size: tuple[int, int], served: Served, shared_data: Path, tmp_path: Path
) -> None:
    picture = next((shared_data / "coco2017_subset/images/val2017").glob("*0785.jpg"))
    asyncio.run(_use_the_page(served.url, size, picture, tmp_path))


async def _use_the_page(url: str, size: tuple[int, int], picture: Path, tmp_path: Path) -> None:
    async with new_page() as page:
        await page.open(url, *size)
        assert not await page.ask("document.getElementById('photo').offsetParent"), "nothing is shown before"
        await page.choose("#file", picture)
        await page.wait_for("!document.getElementById('result').hidden")
        assert "640 × 425 px" in await page.ask("document.getElementById('status').textContent")
        shares = await page.ask("[...document.querySelectorAll('#classes output')].map(each => each.textContent)")
        assert sum(float(share.strip("< %")) for share in shares) == pytest.approx(100, abs=0.5)
        # The photograph lies exactly below its mask, within the window.
        boxes = "['photo', 'mask'].map(id => Object.values(at(id).getBoundingClientRect().toJSON()).map(Math.round))"
        photo_box, mask_box = await page.ask(boxes)
        assert photo_box == mask_box
        assert await page.ask("document.documentElement.scrollWidth") <= size[0]
        # Each pixel has a class, which is shown under the pointer.
        assert await page.ask("indices.length === canvas.width * canvas.height && indices.every(each => each >= 0)")
        left, top, width, height = await page.ask(
            "(({x, y, width, height}) => [x, y, width, height])(canvas.getBoundingClientRect())"
        )
        await page.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + width / 2, y=top + height / 2)
        middle = await page.ask(
            "classes[indices[Math.floor(canvas.height / 2) * canvas.width + canvas.width / 2]].name"
        )
        assert middle in await page.ask("document.getElementById('here').textContent")
        await page.ask("at('opacity').value = 25, at('opacity').dispatchEvent(new Event('input'))")
        assert await page.ask("canvas.style.opacity + at('percent').textContent") == "0.2525 %"
        # With one class selected, the others become transparent, and come back after.
        solid = "painter.getImageData(0, 0, canvas.width, canvas.height).data.filter((_, i) => i % 4 === 3 && _).length"
        everything = await page.ask(solid)
        await page.ask("document.querySelector('#classes button').click()")
        assert await page.ask(solid) == await page.ask("indices.filter(each => each === 0).length") < everything
        await page.ask("document.querySelector('#classes button').click()")
        assert await page.ask(solid) == everything
        assert page.complaints == []
        (tmp_path / "notes.jpg").write_text("no picture")
        await page.choose("#file", tmp_path / "notes.jpg")
        await page.wait_for("!document.getElementById('alert').hidden")
        assert "notes.jpg: This is not a photograph" in await page.ask("document.getElementById('alert').textContent")
        assert await page.ask("document.getElementById('result').hidden")
