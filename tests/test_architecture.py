import ast
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

from transfgu_ray.algorithms.losses import diversity_loss

PACKAGE = Path(__file__).resolve().parents[1] / "transfgu_ray"
FILES = sorted(PACKAGE.rglob("*.py"))
ALGORITHMS = sorted((PACKAGE / "algorithms").glob("*.py"))
THIRD_PARTY = {"numpy", "scipy", "torch", "torchvision", "timm", "faiss", "safetensors", "jaxtyping"}
OWN = {"transfgu_ray.algorithms", "transfgu_ray.errors"}


def _name(path):
    return str(path.relative_to(PACKAGE))


def _imports(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a module comes from"
            # `from transfgu_ray import pipeline` imports transfgu_ray.pipeline.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_allowed_in_algorithms(module):
    top = module.split(".")[0]
    if top == "transfgu_ray":
        return any(module.startswith(f"{own}.") for own in OWN)
    return top in THIRD_PARTY or top in sys.stdlib_module_names


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
    assert "algorithms/cam.py" in map(_name, FILES)
    assert len(ALGORITHMS) >= 13


@pytest.mark.parametrize("path", ALGORITHMS, ids=_name)
def test_algorithms__import_only_what_is_allowed(path):
    assert [m for m in _imports(path.read_text()) if not _is_allowed_in_algorithms(m)] == []


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_package__only_the_pipeline_imports_ray(path):
    uses_ray = any(module.split(".")[0] == "ray" for module in _imports(path.read_text()))
    assert not uses_ray or path.is_relative_to(PACKAGE / "pipeline")


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


@pytest.mark.parametrize("source", ["import ray", "import mlflow", "from transfgu_ray import pipeline"])
def test_is_allowed_in_algorithms__sees_each_kind(source):
    assert not all(map(_is_allowed_in_algorithms, _imports(source)))


def test_conftest__shapes_are_enforced_while_testing():
    with pytest.raises(jaxtyping.TypeCheckError, match="classes"):
        diversity_loss(torch.zeros(3, 4))
