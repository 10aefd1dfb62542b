"""What README.md tells people to type: the program knows every command, and those of its blocks run as they stand."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from tests.builders import contents, make_folder, make_hub_table, make_tar, make_voc
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder, random_vit
from transfgu_ray.cli import app
from transfgu_ray.runs.stages import STAGES, Stage

_ROOT = Path(__file__).resolve().parents[1]
_README = (_ROOT / "README.md").read_text()


def _commands(block: str) -> list[str]:
    """The commands of a block, a line each, without what is said of them."""
    lines = [line.partition("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [command.strip() for line in lines for command in line.split(" && ")]


BLOCKS = [command for block in re.findall(r"```bash\n(.*?)```", _README, re.S) for command in _commands(block)]
# In prose a command may go on in the next line; a name of a command alone counts too.
PROSE = [" ".join(found.split()) for found in re.findall(r"(?<!`)`(transfgu\s[^`]*)`", _README)]

# What a machine without cloud and network cannot do, and what runs the tests themselves.
_ELSEWHERE = ("git clone ", "cd ", "python3 -m venv ", ". .venv", "pip install ", "python -m ", "ray ")
_TINY = [
    "data.image_size=[64, 64]",
    "extract.window_fracs=[0.5, 0.3]",
    "train.batch_size=4",
    "train.round_epochs=[1, 1]",
    "evaluate.num_samples=2",
    "runtime.num_workers=1",
    "runtime.train_workers=1",
]  # fmt: skip
_TINY_VIT = ["encoder.overrides={embed_dim: 24, depth: 2, num_heads: 3, patch_size: 8}"]
_TINY_PRETRAIN = [
    *("encoder.overrides={embed_dim: 24, depth: 2, num_heads: 3, patch_size: 8, img_size: 32}", "data.source_size=32"),
    "crops={global_size: 32, local_size: 16, num_local: 2}",
    "dino={num_prototypes: 16, head_hidden_dim: 16, head_bottleneck_dim: 8}",
    "schedule={epochs: 2, batch_size: 12}",
]


def _sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


_RANDOM = ["--weights", "random", *_sets(*_TINY, *_TINY_VIT)]
# What each command is given besides, so that it takes a minute and not a day; the longest beginning counts.
_SMALLER = {
    "transfgu demo": _sets("train.round_epochs=[1, 1]", "evaluate.baselines=[]"),
    "transfgu run runs/own_prior": _sets(*_TINY, "concepts.num_concepts=4"),
    "transfgu run": _RANDOM,
    "transfgu plan": _RANDOM,
    "transfgu ablate": ["--num-seeds", "1", "--num-scenes", "8", "--only", "ce", *_sets("train.round_epochs=[1, 1]")],
    "transfgu pretrain": _sets(*_TINY_PRETRAIN),
    "transfgu render": ["--num-train", "48", "--num-val", "24"],
    "transfgu tune sweeps/first": ["--num-trials", "2", "--num-scenes", "8", *_sets("train.round_epochs=[1, 1]")],
    "transfgu tune sweeps/mine": ["--num-trials", "2", *_sets(*_TINY)],
}
_PROGRAM = """import json, os, sys
from transfgu_ray.cli import main
sys.argv += json.loads(os.environ['SMALLER'])
main()"""


@pytest.mark.parametrize("command", [c for c in dict.fromkeys([*BLOCKS, *PROSE]) if c.startswith("transfgu ")], ids=str)
def test_commands__are_what_the_program_understands(command: str) -> None:
    words, context, verb = shlex.split(command)[1:], None, typer.main.get_command(app)
    is_mention = len(words) == 1
    while words and hasattr(verb, "get_command"):
        context = verb.make_context(verb.name, [], parent=context, resilient_parsing=True)
        found = verb.get_command(context, words[0])
        assert found is not None, f"{words[0]} is no command"
        verb, words = found, words[1:]
    if not is_mention:
        verb.make_context(verb.name, words, parent=context)


def test_stage_map__is_the_table_of_stages() -> None:
    def row(stage: Stage) -> str:
        module = str(stage.run).partition(":")[0].removeprefix("transfgu_ray.").replace(".", "/")
        leaves = ", ".join(f"`{output}`" for output in stage.outputs) or "`mlflow.db` beside the run"
        what = stage.help.partition(" -> ")[0].removesuffix(".")
        return f"| {stage.name} | {what} | `{module}.py` | {leaves} |"

    expected = "\n".join(["| stage | what it does | module | leaves |", "|---|---|---|---|", *map(row, STAGES)])
    assert f"\n{expected}\n\n" in _README, f"README.md needs this table of stages:\n{expected}"


def test_modules__that_the_page_names_are_there() -> None:
    named = set(re.findall(r"`((?:transfgu_ray/)?[a-z_]+(?:/[a-z_]+)*\.py)`", _README))
    roots = (_ROOT, _ROOT / "transfgu_ray")
    assert len(named) >= 15
    assert [name for name in sorted(named) if not any((root / name).is_file() for root in roots)] == []


def _smaller(command: str) -> list[str]:
    fitting = [known for known in _SMALLER if command.startswith(known)]
    return _SMALLER[max(fitting, key=len)] if fitting else []


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home directory, and the working directory, of someone who has what README.md takes for granted."""
    path = tmp_path_factory.mktemp("home")
    make_folder(path / "photos", 24)
    make_folder(path / "new_photos", 3)
    make_folder(path, 1)
    (path / "photo_000.jpg").rename(path / "photo.jpg")
    for i in range(2):
        make_folder(path / f"labelled_photos/{i}", 15, seed=i)
    make_voc(path / "VOCdevkit/VOC2012", num_train=12)
    make_tar(path / "shards/train-000.tar", contents(path / "photos"))
    make_hub_table(path / "tables/train-0.parquet", contents(path / "photos"))
    (path / "names.yaml").write_text("3: sky\n")
    overrides = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
    vit = random_vit("vit_tiny_patch16_224", overrides, 0)
    (path / "prior.safetensors").write_bytes(dump_encoder(vit, "vit_tiny_patch16_224", overrides=overrides))
    space = re.search(r"```yaml\n(train\.alpha.*?)```", _README, re.S)
    (path / "space.yaml").write_text(space[1])
    program = path / "bin/transfgu"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{_PROGRAM}" "$@"\n')
    program.chmod(0o755)
    return path


def _start(command: str, home: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "HOME": str(home),
        "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(_ROOT),
        "OMP_NUM_THREADS": "1",
        "SMALLER": json.dumps(_smaller(command)),
    }
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(["bash", "-c", command], cwd=home, env=environment, **output)


def _python_blocks() -> Iterator[str]:
    return iter(re.findall(r"```python\n(.*?)```", _README, re.S))


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize("command", [c for c in dict.fromkeys(BLOCKS) if not c.startswith(_ELSEWHERE)], ids=str)
def test_blocks__run_as_they_stand(command: str, home: Path) -> None:
    process = _start(command, home)
    if not command.startswith("transfgu serve"):
        printed = process.communicate(timeout=900)[0]
        assert process.returncode == 0, printed
        assert "Traceback" not in printed, printed
        return
    try:
        curl = next(c for c in re.findall(r"`(curl [^`]*)`", _README))
        for _ in range(60):
            asked = _start(curl, home)
            answer = asked.communicate()[0]
            if asked.returncode == 0:
                break
            time.sleep(2)
        assert json.loads(answer[answer.index("{") :])["width"] == 96
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


@pytest.mark.long
@pytest.mark.ray
def test_python__reads_what_the_commands_before_left(home: Path) -> None:
    before = "import numpy as np\nphotos = np.zeros((2, 96, 96, 3), dtype=np.uint8)\n"
    for block in _python_blocks():
        process = subprocess.run([sys.executable, "-c", before + block], cwd=home, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
