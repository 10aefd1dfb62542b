from importlib.metadata import version
from pathlib import Path

import transfgu_ray.tracking
from transfgu_ray.tracking.requirements import requirements_of

ROOM = Path(transfgu_ray.tracking.__file__).parent


def test_requirements_of__exactly_the_needs_of_the_logged_model():
    found = dict(line.split("==") for line in requirements_of(ROOM / "pyfunc.py"))
    assert {"mlflow", "numpy", "pillow", "pyarrow", "safetensors", "timm", "torch", "torchvision"} <= {*found}
    assert not {"ray", "typer", "optuna", "faiss-cpu", "matplotlib"} & {*found}, "nothing of training or of pages"
    assert found["numpy"] == version("numpy")


def test_requirements_of__follows_imports_inside_functions():
    # `transfgu_ray.tracking.registry` reaches pydantic only through the configuration.
    assert any(line.startswith("pydantic==") for line in requirements_of(ROOM / "registry.py"))
    assert "networkx" not in str(requirements_of(ROOM / "registry.py")), (
        "torch depends on it, the package does not declare it"
    )
