"""`--accelerate_config`: its files, and the signals that go on to the training processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from ra3_trl.cli import launch, main, train


FOLDER = Path(__file__).parents[1] / "examples" / "accelerate_configs"
FILES = {
    "single": ("NO", 1), "multi_process": ("MULTI_GPU", 2), "multi_gpu": ("MULTI_GPU", 2), "fsdp2": ("FSDP", 2),
    "zero2": ("DEEPSPEED", 2), "zero3": ("DEEPSPEED", 2), "multi_node": ("MULTI_GPU", 16),
    "multi_node_fsdp2": ("FSDP", 16), "multi_node_zero3": ("DEEPSPEED", 16),
}  # fmt: skip


# ---- the files ----


def test_every_file_is_tested():
    assert {path.stem for path in FOLDER.glob("*")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file(name):
    file = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert (config.distributed_type.value, config.num_processes) == FILES[name]
    comment = file.read_text().split("compute_environment")[0]
    assert f"--accelerate_config examples/accelerate_configs/{name}.yaml" in comment
    assert ("ntested" in comment) == (name not in ("single", "multi_process"))  # the two that run on this machine
    assert config.use_cpu == (name == "multi_process")
    nodes = 2 if name.startswith("multi_node") else 1
    assert (config.num_machines, config.num_processes // nodes) == (nodes, 8 if nodes == 2 else FILES[name][1])
    assert ("--machine_rank 0" in comment) == (nodes == 2)
    if "zero" in name:
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
    if "fsdp2" in name:
        assert config.fsdp_config["fsdp_version"] == 2


def test_a_path_comes_before_a_name_of_trl(tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    assert launch.config_file("examples/accelerate_configs/fsdp2.yaml").is_file()
    assert launch.config_file("fsdp2").parent.parent.name == "trl"
    with pytest.raises(ValueError, match="`accelerate_config` is 'multi_process', neither a file nor one of"):
        launch.config_file("multi_process")


@pytest.mark.parametrize(("own", "added"), [([], ["--use_cpu"]), (["--use_cpu", "true"], []), (["--use-cpu"], [])])
def test_a_file_for_the_cpu_says_so_to_the_training(own, added):
    parser, file = train.make_parser(), str(FOLDER / "multi_process.yaml")
    command = launch.launch_command(parser, ["--accelerate_config", file, "--e_steps", "2", *own])
    assert command[command.index("ra3_trl.cli.train") + 1 :] == ["--e_steps", "2", *own, *added]


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch.check_world(1)  # a cluster may export it for a single process
    monkeypatch.setenv("LOCAL_RANK", "0")
    launch.check_world(2)
    with pytest.raises(ValueError, match="`use_cpu` is False .* 2 processes .*pass `--use_cpu`"):
        launch.check_world(1)


# ---- signals ----

# As `accelerate launch`: starts a training process, fails with 1 if that fails, and must not be hit by a signal.
LAUNCHER = """
import signal, subprocess, sys
from pathlib import Path
folder = Path(sys.argv[1])
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: (folder / "launcher_hit").touch())
sys.exit(1 if subprocess.call([sys.executable, "-c", sys.argv[2], str(folder)]) else 0)
"""
# As the training: saves when the signal comes, and ends with the code that the signal stands for (or goes on to 0).
TRAINING = """
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
def stop(number, frame):
    (folder / "saved").write_text(str(int(number)))
    sys.exit({code})
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
(folder / "ready").touch()
time.sleep(30)
"""


def launch_and_signal(folder: Path, number: int, code: str) -> int:
    """`launch` of the two above, with a signal to this process as soon as the training is under way."""
    before = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGTERM, signal.SIGINT)}  # pytest must not end

    def send() -> None:
        while not (folder / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send, daemon=True)
    try:
        sender.start()
        return launch.launch([sys.executable, "-c", LAUNCHER, str(folder), TRAINING.format(code=code)], "ra3 train")
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("number", "code", "expected"),
    [(signal.SIGTERM, "128 + number", 143), (signal.SIGINT, "130", 130), (signal.SIGTERM, "0", 0)],
)
def test_a_signal_goes_on_to_the_training_process(tmp_path, number, code, expected):
    """The training saves and ends; the launcher is left alone (it would kill after 30 s); the code is passed on."""
    handler = signal.getsignal(signal.SIGTERM)
    assert launch_and_signal(tmp_path, number, code) == expected
    assert (tmp_path / "saved").read_text() == str(int(number))
    assert not (tmp_path / "launcher_hit").exists()
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("None", 0)])
def test_the_code_of_the_launched_command(end, code, monkeypatch):
    assert launch.launch([sys.executable, "-c", f"import os, sys; {end}"], "ra3 train") == code


def test_the_users_command_is_handed_on(tmp_path):
    out = tmp_path / "typed"
    script = f"import os; open({str(out)!r}, 'w').write(os.environ[{launch.LAUNCHED!r}])"
    assert launch.launch([sys.executable, "-c", script], "ra3 train --seed 3") == 0
    assert out.read_text() == "ra3 train --seed 3"


def test_resume_command():
    hint = "ra3 train --output_dir 'my run' --seed 3 --resume_from_checkpoint true"
    assert train.resume_command("ra3 train --output_dir 'my run' --seed 3") == hint
    for typed in ("--resume_from_checkpoint=true", "--resume_from_checkpoint x/checkpoint-3"):
        assert train.resume_command(f"ra3 train --output_dir 'my run' {typed} --seed 3") == hint


def test_sigterm_leaves_with_its_code(monkeypatch, tmp_path):
    """The trainer says how to go on and leaves with 143; neither is lost in the command."""
    told = {}

    def build(*_):
        return type("Trainer", (), {"is_world_process_zero": lambda self: True})()

    def run(trainer, *_):
        told["hint"] = trainer.resume_hint
        raise SystemExit(143)

    monkeypatch.setattr(train, "build_trainer", build)
    monkeypatch.setattr(train, "run", run)
    argv = ["train", "--model_name_or_path", "m", "--use_cpu", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main.main(argv)
    assert stop.value.code == 143
    assert told["hint"] == f"`ra3 {' '.join(argv)} --resume_from_checkpoint true`"


def test_yaml_of_accelerate_is_plain():
    for path in FOLDER.glob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)
