import ast
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

from transfgu_ray.algorithms.rounds.losses import diversity_loss

PACKAGE = Path(__file__).resolve().parents[1] / "transfgu_ray"
FILES = sorted(PACKAGE.rglob("*.py"))
THIRD_PARTY = {"numpy", "scipy", "torch", "torchvision", "timm", "faiss", "safetensors", "jaxtyping", "sklearn"}
# From the top of the house to the ground: a room may import what stands below its own line, never beside or above it.
FLOORS = (
    ("cli",),
    ("bench", "planning"),
    ("studies",),
    ("pipeline",),
    ("serving", "pretraining", "tracking"),
    ("reports", "engine"),
    ("models", "runs"),
    ("config",),
    ("datasets",),
    ("scenes",),
    ("algorithms/baselines",),
    ("algorithms/labels", "algorithms/rounds", "algorithms/dino"),
    ("algorithms/encoder", "algorithms/concepts", "algorithms/scores"),
    ("images", "storage", "surroundings"),
    ("tiff",),
    ("errors", "background", "cores"),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MAY_IMPORT_RAY = {"engine", "pipeline", "pretraining", "serving", "studies", "planning", "tracking", "bench", "cli"}


def _name(path):
    return str(path.relative_to(PACKAGE))


def _room(module):
    """The room of a dotted module below the package, e.g. `algorithms/labels`; None for the package itself."""
    parts = module.split(".")[1:]
    for length in (2, 1):
        if (room := "/".join(parts[:length])) in FLOOR_OF:
            return room
    return None


def _module(path):
    return ".".join(("transfgu_ray", *path.relative_to(PACKAGE).with_suffix("").parts))


def _imports(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a module comes from"
            # `from transfgu_ray import pipeline` imports transfgu_ray.pipeline.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _wrong_imports(room, source):
    """What a module of a room imports that stands beside or above it, or is kept for other rooms."""
    for module in _imports(source):
        top = module.split(".")[0]
        if top == "transfgu_ray":
            imported = _room(module)
            is_wrong = imported not in (None, room) and FLOOR_OF[imported] <= FLOOR_OF[room]
            # Nothing of the package itself but its version.
            is_wrong = is_wrong or (imported is None and module != "transfgu_ray.__version__")
        elif room.startswith("algorithms"):
            is_wrong = top not in THIRD_PARTY and top not in sys.stdlib_module_names
        else:
            is_wrong = (top == "ray" and room not in MAY_IMPORT_RAY) or (top == "mlflow" and room != "tracking")
        if is_wrong:
            yield module


def _unsafe(source):
    """Calls and imports that could run code from data."""
    found = [m for m in _imports(source) if m.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib", "marshal"}]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
        if call in {"eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "yaml.full_load"} or (
            call == "torch.load" and not safe
        ):
            found.append(ast.unparse(node))
        # No shell: commands are lists of words.
        shell = any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords)
        if shell or call in {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}:
            found.append(ast.unparse(node))
        # NumPy reads pickles only when told to.
        pickles = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
        found += [ast.unparse(node)] * pickles
    return found


def test_files__are_found():
    assert {"algorithms/labels/cam.py", "cli/__init__.py", "errors.py"} <= {*map(_name, FILES)}
    assert len(FILES) >= 150


def test_rooms__each_is_on_one_floor_and_there():
    assert len(FLOOR_OF) == sum(map(len, FLOORS))
    assert [room for room in FLOOR_OF if not any(PACKAGE.glob(f"{room}*"))] == []


# Packages of rooms, which only say what they are.
@pytest.mark.parametrize(
    "path", [p for p in FILES if _name(p) not in ("__init__.py", "algorithms/__init__.py")], ids=_name
)
def test_package__every_module_lies_in_a_room_and_imports_downwards(path):
    room = _room(_module(path))
    assert room is not None, f"{_name(path)} lies in no room of FLOORS"
    assert [*_wrong_imports(room, path.read_text())] == []


@pytest.mark.parametrize("name", ["__init__.py", "algorithms/__init__.py"])
def test_package__packages_of_rooms_import_nothing(name):
    assert [*_imports((PACKAGE / name).read_text())] == []


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_package__runs_no_code_from_data(path):
    assert _unsafe(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "eval('1')",
        "yaml.load(text)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_unsafe__sees_each_kind(source):
    assert _unsafe(source)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("algorithms/labels", "import ray"),
        ("algorithms/labels", "from transfgu_ray import pipeline"),
        ("algorithms/labels", "from transfgu_ray.algorithms.rounds import losses"),
        ("algorithms/labels", "def f():\n    from transfgu_ray.storage import Folder\n    from mlflow import x"),
        ("reports", "import ray.data"),
        ("pipeline", "from mlflow import MlflowClient"),
        ("engine", "from transfgu_ray.reports.page import render"),
        ("datasets", "from transfgu_ray.config.run import RunConfig"),
        ("cli", "from transfgu_ray import elsewhere"),
        ("storage", "from transfgu_ray.images import decode_rgb"),
    ],
)
def test_wrong_imports__sees_each_kind(room, source):
    assert [*_wrong_imports(room, source)]


def test_conftest__shapes_are_enforced_while_testing():
    with pytest.raises(jaxtyping.TypeCheckError, match="classes"):
        diversity_loss(torch.zeros(3, 4))
