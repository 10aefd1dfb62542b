"""What the command line refuses, in one sentence and with exit code 2; and how fast it answers."""

import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from tests.builders import TINY_OVERRIDES, TINY_VIT, listed, make_coco, make_folder, make_scenes, make_table
from tests.faults.storage import truncate
from tests.serving.test_outputs import small_model
from transfgu_ray.algorithms.encoder.checkpoints import dump_encoder, random_vit
from transfgu_ray.cli import app, main
from transfgu_ray.runs import lock
from transfgu_ray.runs.run import Run
from transfgu_ray.storage import Folder


def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["transfgu", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, "one sentence, no traceback"
    return message


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--set", "concepts.num_concept=3"), "did you mean concepts.num_concepts?"),
        (("--set", "colour=3"), "unknown setting colour"),
        (("--set", "concepts.num_concepts=0"), "concepts.num_concepts=0"),
        (("--set", "concepts.num_concepts=100000"), "more than the"),
        (("--set", "data.image_size=[100, 100]"), "patch of 8 px does not divide"),
        (("--set", "train.token_window=20"), "train.token_window=20 must be a multiple"),
        (("--set", "train.token_window=72"), "no larger than train.crop_size, 32 x 32 px"),
        (("--preset", "huge"), "unknown preset 'huge'"),
        (("--dataset", "imagenet"), "unknown dataset"),
        (("--config", "no.yaml"), "cannot read the configuration file no.yaml"),
        (("--data", "no/such/folder"), "does not exist"),
        (("--weights", "no/such.pth"), "cannot be read"),
    ],
)
def test_run__bad_input(
    extra: tuple[str, ...],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = make_folder(tmp_path / "data", num_images=2)
    base = ("run", str(tmp_path / "run"), "--preset", "tiny_cpu", "--data", str(data))
    assert words in refusal(capsys, monkeypatch, *base, *extra)


@pytest.mark.parametrize("command", [("run", "--preset", "tiny_cpu"), ("pretrain",), ("tune", "--num-trials", "2")])
def test_commands__refuse_a_folder_where_another_process_is_at_work(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_DYING_S", 0.1)
    data, (name, *options) = make_folder(tmp_path / "data", num_images=2), command
    with lock.locked(Folder(str(tmp_path / "out"))):
        message = refusal(capsys, monkeypatch, name, str(tmp_path / "out"), "--data", str(data), *options)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [lock.LOCK], "nothing is touched"
    assert f"is at work in {tmp_path / 'out'}" in message


# What a command is doing when the signal comes: waiting, or closing, or nothing that an exception could end.
_WAITS = "time.sleep(60)"
_SWALLOWS = """
while True:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0)
        if tries.pop():
            break
time.sleep(60)
"""
_CLOSES = """
try:
    time.sleep(60)
finally:
    print("closing", flush=True)
    time.sleep(3)
    print("closed", flush=True)
"""
_NEVER_CLOSES = """
try:
    time.sleep(60)
finally:
    time.sleep(60)
"""
_FAILS = """
try:
    time.sleep(60)
except KeyboardInterrupt:
    raise ValueError("made of it")
"""


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("body", [_WAITS, _SWALLOWS, _CLOSES, _NEVER_CLOSES, _FAILS])
def test_main__stopped_says_so_once_whatever_it_is_doing(body: str, by: int) -> None:
    # A busy machine stands still for seconds, which must not count as closing.
    closing_s = 5.0 if body == _NEVER_CLOSES else 30.0
    script = (
        "import time, transfgu_ray.cli as cli, transfgu_ray.background as background\n"
        f"background._AGAIN_S, background._CLOSING_S, tries = 0.5, {closing_s}, [True, False]\n"
        f"def app():\n    print('up', flush=True)\n{textwrap.indent(body, '    ')}\n"
        "cli.app = app\ncli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(by)
    time.sleep(1)
    # Schedulers often send it twice.
    process.send_signal(by)
    out, said = process.communicate(timeout=60)
    assert said == "transfgu: stopped; the same command goes on from here\n"
    assert process.returncode == 128 + by
    assert out == ("closing\nclosed\n" if body == _CLOSES else "")


def test_run__unwritable_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_folder(tmp_path / "data", num_images=2)
    # A file where a folder must be: root may write anywhere else.
    (tmp_path / "file").write_text("")
    message = refusal(
        capsys, monkeypatch, "run", str(tmp_path / "file" / "run"), "--preset", "tiny_cpu", "--data", str(data)
    )
    assert "run folder" in message or "cannot write" in message


def test_run__no_photographs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("")
    message = refusal(
        capsys, monkeypatch, "run", str(tmp_path / "run"), "--preset", "tiny_cpu", "--data", str(tmp_path / "data")
    )
    assert "no photograph in" in message


def test_stage__no_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is no run folder" in refusal(capsys, monkeypatch, "train", str(tmp_path / "nothing"))


def test_predict__no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_folder(tmp_path / "data", num_images=1)
    message = refusal(
        capsys, monkeypatch, "predict", str(tmp_path), "--images", str(data), "--out", str(tmp_path / "out")
    )
    assert "neither a finished run nor a model folder" in message


@pytest.mark.parametrize("port", ["80x", "0"])
def test_serve__no_such_port(port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["transfgu", "serve", str(tmp_path), "--port", port])
    with pytest.raises(SystemExit, match="2"):
        main()


def test_serve__no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "neither a finished run nor a model folder" in refusal(capsys, monkeypatch, "serve", str(tmp_path))


def test_demo__renders_scenes_beside_the_run_and_wants_the_bundled_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transfgu_ray.config.presets.DEMO_SCENES", {"num_train": 2, "num_val": 1, "seed": 0, "size_px": 64}
    )
    monkeypatch.setattr("transfgu_ray.models.weights._BUNDLED", "weights/not_there.safetensors")
    arguments = ("demo", str(tmp_path / "run"), "--set", "seed=1", "--set", "concepts.granularity=super")
    assert "no weights/not_there.safetensors; install the package again" in refusal(capsys, monkeypatch, *arguments)
    stored = Run.stored_config(str(tmp_path / "run"))
    assert stored is not None
    assert stored.data.root == str(tmp_path / "scenes")
    assert (stored.preset, stored.seed, stored.num_concepts, stored.num_background) == ("demo", 1, 6, 2)
    images = listed(stored.data, "val", "super").images
    assert [image.label_id for image in images] == ["masks/super/val/scene_00000.png"]
    # A named source is not a path.
    again = ("run", str(tmp_path / "other"), "--preset", "demo", "--data", stored.data.root, "--weights", "bundled")
    assert "encoder.weights=bundled, but this installation" in refusal(capsys, monkeypatch, *again)


def test_run__missing_labels_are_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_scenes(tmp_path / "data")
    (data / "masks/fine/val").rename(tmp_path / "elsewhere")
    arguments = ("run", str(tmp_path / "run"), "--preset", "demo", "--data", str(data), "--weights", "random")
    assert "data/masks/fine/val (dataset scenes): expected" in refusal(capsys, monkeypatch, *arguments)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--set", "dino.learning_rat=3"), "did you mean dino.learning_rate?"),
        (("--set", "schedule.batch_size=9"), "more than the 3 images to train on"),
        (("--set", "crops.global_size=60"), "patch of 8 px does not divide"),
        (("--set", "encoder.name=resnet18"), "is not a usable vision transformer"),
        (("--preset", "paper"), "unknown pretraining preset 'paper'"),
        (("--data", "no/such/folder"), "does not exist"),
        (("--val", "no/such/folder"), "data.val_root="),
    ],
)
def test_pretrain__bad_input(
    extra: tuple[str, ...],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = make_folder(tmp_path / "data", num_images=3)
    base = ("pretrain", str(tmp_path / "out"), "--preset", "small_photos", "--data", str(data))
    assert words in refusal(capsys, monkeypatch, *base, *extra)


def test_pretrain__nothing_said_about_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "holds no pretraining" in refusal(capsys, monkeypatch, "pretrain", str(tmp_path / "out"))
    message = refusal(capsys, monkeypatch, "pretrain", str(tmp_path / "out"), "--preset", "small_photos")
    assert "give --data DIR or set data.root" in message


def test_presets__those_of_each_verb_under_its_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in ((), ("show", "small_photos")):
        monkeypatch.setattr(sys, "argv", ["transfgu", "presets", *arguments])
        with pytest.raises(SystemExit):
            main()
        out = capsys.readouterr().out
        if arguments:
            assert yaml.safe_load(out)["crops"]["hue"] == 0.1
        else:
            runs, _, pretrainings = out.partition("transfgu pretrain --preset")
            assert "\n  paper" in runs
            assert "\n  small_photos" in pretrainings


def test_presets__differences_with_their_sources(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["transfgu", "presets", "diff", "paper", "released", "--dataset", "coco_stuff171"])
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    assert out.startswith("coco_stuff171: paper -> released\n")
    assert "\ncam.keep_mass: null -> 0.8\n    share of a CAM" in out


def test_datasets__lists_and_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_coco(tmp_path, num_train=1, num_val=1)
    for arguments, words in (
        ((), "\ncoco80: 81 classes, things_only\n"),
        (("check", "coco80", str(tmp_path)), "val    classes"),
    ):
        monkeypatch.setattr(sys, "argv", ["transfgu", "datasets", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code in (0, None)
        assert words in capsys.readouterr().out
    next(tmp_path.glob("annotations/val2017/*.png")).unlink()
    message = refusal(capsys, monkeypatch, "datasets", "check", "coco80", str(tmp_path), "--quiet")
    assert message.endswith("is not a usable copy of coco80: 1 files were refused\n")


@pytest.mark.reports
def test_datasets__are_checked_by_the_limits_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_folder(tmp_path, num_images=1, size=(40, 30))
    words = ("datasets", "check", "folder", str(data))
    assert "1 files were refused" in refusal(capsys, monkeypatch, *words, "--quiet")
    assert "data.bands.2=[3, 2]: field required" in refusal(capsys, monkeypatch, *words, "--set", "data.bands=[3,2]")
    monkeypatch.setattr(sys, "argv", ["transfgu", *words, "--set", "data.min_side_px=30"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None)


def test_probe__prints_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_table(tmp_path / "train-0.parquet", 6)
    make_table(tmp_path / "val-0.parquet", 4)
    encoder = random_vit(TINY_VIT, TINY_OVERRIDES, 0)
    (tmp_path / "w.safetensors").write_bytes(dump_encoder(encoder, TINY_VIT, overrides=TINY_OVERRIDES))
    arguments = ("probe", str(tmp_path / "w.safetensors"), "--data", str(tmp_path), "--image-size", "32")
    monkeypatch.setattr(sys, "argv", ["transfgu", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert re.search(r"images +4 at 32 px", out)
    assert re.search(r"k-NN top-1 +\d+\.\d\d % of 6 neighbours", out)
    assert re.search(r"chance +50\.00 %", out)
    assert re.search(r"IoU of attention +\d+\.\d\d %", out)
    assert "no/such.safetensors cannot be read" in refusal(
        capsys, monkeypatch, "probe", "no/such.safetensors", "--data", str(tmp_path)
    )


def test_help__imports_nothing_heavy() -> None:
    code = (
        "import sys; from transfgu_ray.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'pyarrow', 'numpy', 'faiss', 'timm') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.rstrip().endswith("[]")


def test_help__says_each_command_whole_in_80_columns() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).stdout
    listed = shown.partition("Commands:\n")[2]
    assert len(listed.splitlines()) == len(typer.main.get_command(app).commands)
    assert "..." not in listed


def test_run__settings_of_an_existing_run_are_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_folder(tmp_path / "data", num_images=2)
    folder = str(tmp_path / "run")
    base = ("run", folder, "--preset", "tiny_cpu", "--data", str(data))
    refusal(capsys, monkeypatch, *base, "--set", "concepts.num_concepts=100000")
    # Without --preset the stored configuration is the base, not the default preset.
    refusal(capsys, monkeypatch, "run", folder, "--set", "concepts.num_concepts=200000")
    stored = Run.stored_config(folder)
    assert stored is not None
    assert stored.preset == "tiny_cpu"
    assert stored.concepts.num_concepts == 200000


@pytest.mark.reports
@pytest.mark.parametrize(
    "command", ["plan --gpu-tflops", "serve nowhere --max-megabytes", "serve nowhere --max-megapixels"]
)
def test_options__numbers_are_finite(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal(capsys, monkeypatch, *command.split(), "inf")
    assert message == f"transfgu: {command.split()[-1]} inf must be a finite number\n"


@pytest.mark.reports
def test_predict__a_damaged_model_is_told_before_anything_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, photos, out = tmp_path / "model", make_folder(tmp_path / "photos", num_images=1), tmp_path / "out"
    small_model(model, 3)
    truncate(model / "decoder.safetensors")
    (out / "masks").mkdir(parents=True)
    message = refusal(capsys, monkeypatch, "predict", str(model), "--images", str(photos), "--out", str(out))
    assert f"{model}/decoder.safetensors is not a readable safetensors file" in message
    assert [path.name for path in out.iterdir()] == ["masks"]
