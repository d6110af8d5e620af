"""Files of ours that somebody has changed: exit 0, or one line that names the file, in bounded memory and time."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shlex
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import TrainerState

from ra3_trl import RA3Config
from ra3_trl.cli import train
from ra3_trl.cli.launch import launch_command, read_arguments
from ra3_trl.cli.main import guarded
from ra3_trl.config_file import read_settings
from ra3_trl.em.checkpoint import check_resumable, run_settings
from ra3_trl.em.learner import HeadLearner
from ra3_trl.em.schedule import Schedule
from ra3_trl.em.state import EMState
from ra3_trl.evaluation.card import add_to_card
from ra3_trl.evaluation.compare import choose_ks, compare_runs, match_problems, read_entrants, sampling_notes
from ra3_trl.evaluation.draw import _resume
from ra3_trl.evaluation.samples import read_samples
from ra3_trl.evaluation.tasks import load_benchmark
from ra3_trl.models import AbstractionHead, FrozenWeights, load_head
from ra3_trl.models.head import AbstractionConfig, save_head
from ra3_trl.policy import open_settings
from ra3_trl.report.compare import comparison_markdown, comparison_table
from ra3_trl.report.latents import LatentLog
from ra3_trl.report.page import render
from ra3_trl.report.report import make_sections
from ra3_trl.report.runs import read_runs


hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


MEMORY, SECONDS = 2 << 30, 10.0  # that one file may take: address space, and time of this process
TASK = {"task_id": "T/0", "prompt": "def f(x):\n", "test": "def check(f):\n    assert f(1) == 1\n", "entry_point": "f"}
LATENT = {"line": 2, "text": " why", "gain": 0.5}
ROW = {"annotated_text": "def f():\n    # why\n    return 1\n", "latents": [LATENT, LATENT | {"gain": None}]}
LOG = [
    {"step": 1, "estep/gain": 0.5, "estep/reward": 1.0, "loss": 2.0},
    {"step": 2, "mstep/code_loss": 1.5, "eval_ce": 2.0, "eval_elbo": 2.1},
]
RESULTS = {
    "version": 1, "task": "toy", "num_tasks": 2, "num_samples": 2, "forgeable": 0, "think_rate": 0.2,
    "run": {"settings": {"think": "auto", "temperature": 0.8, "num_samples": 2}, "tasks": "ab", "form": "complete",
            "limits": {"seconds": 3.0, "memory_mb": 512}, "checkpoint": "gone", "weights": "0"},
    "problems": {f"T/{i}": {"verdict": ["passed", "failed"], "plus_verdict": ["failed", "failed"]} for i in (0, 1)},
    "pass@k": {"1": {"value": 0.5, "low": 0.1, "high": 0.9}}, "plus_pass@k": {"1": {"value": 0.0}},
    "verdicts": {"passed": 2, "failed": 2},
}  # fmt: skip
YAML = {
    "model_name_or_path": "m", "output_dir": "out", "max_steps": 8, "learning_rate": 1e-4, "penalty": 0.2,
    "model_init_kwargs": {"subfolder": "x"}, "env": {"SOME_NAME": "1"}, "report_to": ["none"], "use_cpu": True,
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A kind of file: what writes a good one and gives its path, and what reads it."""

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]


def args_in(folder: Path) -> RA3Config:
    return RA3Config(str(folder), e_steps=2, m_steps=2, use_cpu=True, report_to="none")


def put(name: str, content: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(json.dumps(content))
        return folder / name

    return write


def put_lines(name: str, *rows: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / name

    return write


def put_config(folder: Path) -> Path:
    args_in(folder).save_pretrained(str(folder))
    return folder / "ra3_config.json"


def put_head(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save_head(AbstractionHead(AbstractionConfig(8)), folder)
        return folder / name

    return write


def learner_in(folder: Path) -> HeadLearner:
    return HeadLearner(AbstractionHead(AbstractionConfig(8)), args_in(folder))


def put_state(name: str) -> Callable[[Path], Path]:
    """A checkpoint as far as resuming reads it."""

    def write(folder: Path) -> Path:
        args, state = args_in(folder), EMState.anew(args_in(folder), learner_in(folder))
        state.learner.begin_phase()
        state.metrics.add("loss", 1.0)
        state.frozen["start"] = FrozenWeights(torch.nn.Linear(2, 2))
        state.begin_pass()
        state.save(folder, {"settings": run_settings(args, {}), "last_update": ["E", 0, 0]}, True, True)
        TrainerState(global_step=1, log_history=LOG).save_to_json(str(folder / "trainer_state.json"))
        return folder / name

    return write


def resume(path: Path) -> None:
    args = args_in(path.parent)
    check_resumable(path.parent, run_settings(args, {}), Schedule(1, 2, 2), with_optimizer=False)
    state = EMState.anew(args, learner_in(path.parent))
    state.load(path.parent, 0, torch.nn.Linear(2, 2))
    state.metrics.averages()


def compare(path: Path) -> None:
    other = path.parent / "other"
    other.mkdir(exist_ok=True)
    put("results.json", RESULTS)(other)
    entrants = read_entrants([str(path.parent), str(other)])
    match_problems(entrants)
    runs = {entrant.name: entrant.results for entrant in entrants}
    models, notes = compare_runs(runs, choose_ks(runs, None, None)), sampling_notes(runs)
    comparison = {"task": "toy", "num_tasks": 2, "models": models, "notes": notes}
    comparison_table(comparison)
    assert "<img" not in comparison_markdown(comparison, None)


def report(path: Path) -> None:
    sections = make_sections(read_runs([f"run={path.parent if path.suffix == '.json' else path}"]))
    names = [chart.name for section in sections for chart in section.charts]
    page = render("report.html.jinja", title="x", sections=sections, pictures=dict.fromkeys(names, ""))
    assert "<img src=x" not in page and page.encode()


def report_rows(path: Path) -> None:
    make_sections(read_runs([f"run={path}"]))


def go_on(path: Path) -> None:
    _resume(path.parent, {"settings": {"think": "auto"}, "seed": 1}, [])


def put_run(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        put("run.json", {"settings": {"think": "auto"}, "seed": 1})(folder)
        put_lines("samples.jsonl", {"task_id": "T/0", "completion": "x", "sample": 0})(folder)
        return folder / name

    return write


def samples(path: Path) -> None:
    read_samples(path, load_benchmark(str(put_lines("toy.jsonl", TASK)(path.parent))))


def put_yaml(folder: Path) -> Path:
    return put("run.yaml", YAML)(folder)  # JSON is YAML


def parse(path: Path) -> None:
    with mock.patch.dict(os.environ), mock.patch("ra3_trl.cli.launch.launch", lambda *_: 0):
        read_arguments(train.make_parser(), ["--config", str(path)])


def put_accelerate(folder: Path) -> Path:
    return put("accelerate.yaml", {"use_cpu": True, "num_processes": 2})(folder)


def launch(path: Path) -> None:
    launch_command(train.make_parser(), shlex.split(f"--accelerate_config {path} --output_dir x"))


def put_card(folder: Path) -> Path:
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- a\n---\n# A model\n")
    return folder / "README.md"


def put_latents(folder: Path) -> Path:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"step": 1, "latent": " a", "gain": 0.5}]), folder / "step_000001.parquet")
    return folder / "step_000001.parquet"


JSON = {  # what is changed value by value
    "ra3_config.json": Format(put_config, lambda path: open_settings(read_settings(str(path.parent)), {}, str(path))),
    "settings to train by": Format(put_config, lambda path: RA3Config.from_pretrained(str(path.parent), use_cpu=True)),
    "abstraction_config.json": Format(put_head("abstraction_config.json"), lambda path: load_head(str(path.parent))),
    "ra3_state.json": Format(put_state("ra3_state.json"), resume),
    "trainer_state.json": Format(put_state("trainer_state.json"), resume),
    "results.json": Format(put("results.json", RESULTS), compare),
    "a run's log": Format(put("trainer_state.json", {"log_history": LOG}), report),
    "run.json": Format(put_run("run.json"), go_on),
    "settings in YAML": Format(put_yaml, parse),
    "accelerate's YAML": Format(put_accelerate, launch),
    "annotated.json": Format(put("rows.json", [ROW, ROW]), report_rows),
    "annotated.jsonl": Format(put_lines("rows.jsonl", ROW), report_rows),
    "a task": Format(put_lines("tasks.jsonl", TASK), lambda path: load_benchmark(str(path))),
    "a sample": Format(put_lines("samples.jsonl", {"task_id": "T/0", "completion": "    return x\n"}), samples),
}
BINARY = {  # what is changed byte by byte only
    "abstraction_head.safetensors": Format(
        put_head("abstraction_head.safetensors"), lambda path: load_head(str(path.parent))
    ),
    "ra3_head_state.safetensors": Format(put_state("ra3_head_state.safetensors"), resume),
    "ra3_frozen.safetensors": Format(put_state("ra3_frozen.safetensors"), resume),
    "latents": Format(put_latents, lambda path: LatentLog(path.parent, None, 1).latest(9)),
    "a card": Format(put_card, lambda path: add_to_card(RESULTS, path.parent)),
}

# ---- what is done to them ----

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from(
        [10**9, 10**30, -(10**400), 1e308, "x" * 5000, "a\nb", "\u2028", "<img src=x>", "../../up", "a\0b", "\ud800",
         "inf", "nan", [], {}, [[]], [None], [{}], [[1]], {"": None}, {"value": "x"}, {"x": {"x": {}}}]
    ),
)  # fmt: skip
WHOLE = (
    b"", b" ", b"null", b"[]", b"{}", b"3", b'"x"', b"NaN", b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"1" * 5000,
    b"[" * 100_000, b'{"a":' * 50_000, b"\0" * 64, struct.pack("<Q", 2**62), struct.pack("<Q", 100) + b"{" * 100,
    b"a: &a [*a]", b"&a [&b [&c [1]]]: {}", b"--- !!python/object/apply:os.system ['true']", b"%PDF-1.4\n", b"x: [",
)  # fmt: skip


def changed(draw: Callable[[Any], Any], content: Any) -> Any:
    """`content` with one value in it replaced, left out, doubled or renamed."""
    if not isinstance(content, (dict, list)) or not content or draw(st.integers(0, 7)) == 0:
        return draw(VALUES)
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = draw(st.sampled_from(keys))
    what = draw(st.integers(0, 9))
    out = dict(content) if isinstance(content, dict) else list(content)
    if what == 0:
        del out[key]
    elif what == 1 and isinstance(out, dict):
        out[draw(st.text(max_size=4))] = out.pop(key)
    elif what == 1:
        out.append(out[key])
    else:
        out[key] = changed(draw, content[key])
    return out


@st.composite
def changed_json(draw: Callable[[Any], Any], original: bytes, lines: bool) -> bytes:
    """A file of JSON with up to three changed values, or one whose bytes were changed."""
    if draw(st.integers(0, 3)) == 0:
        return draw(changed_bytes(original))
    content = json.loads(original)
    for _ in range(draw(st.integers(1, 3))):
        content = changed(draw, content)
    return json.dumps(content, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass") + b"\n" * lines


@st.composite
def changed_bytes(draw: Callable[[Any], Any], original: bytes) -> bytes:
    """A file that was cut, overwritten in places, or is another one."""
    if draw(st.booleans()):
        return draw(st.sampled_from(WHOLE))
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(content), 400)))  # heads are more worth changing than weights
        content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No more address space than `MEMORY` beyond what is taken, inside: what asks for more gets a `MemoryError`."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check(format_: Format, path: Path, content: bytes) -> str:
    """Reads the file as a command does; gives what it said."""
    path.write_bytes(content)
    said, begin = io.StringIO(), time.process_time()

    def command(words: list[str]) -> int:
        format_.read(path)
        return 0

    with bounded(), contextlib.redirect_stderr(said):
        try:
            code = guarded(command, [])
        except SystemExit as end:  # argparse says it and ends
            code = int(end.code)
    text = said.getvalue()
    assert time.process_time() - begin < SECONDS
    if code:
        assert code == 2 and text.startswith("error: ") and text.count("\n") == 1 and len(text) < 3000, text
        assert path.name in text or path.parent.name in text, text
    return text


def fuzz(name: str, format_: Format, folder: Path, examples: int) -> None:
    folder.mkdir(exist_ok=True)
    path = format_.write(folder)
    original = path.read_bytes()
    assert not check(format_, path, original)  # the good one is read
    is_json = name in JSON
    files = changed_json(original, path.suffix == ".jsonl") if is_json else changed_bytes(original)
    refused = 0

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(files)
    def run(content: bytes) -> None:
        nonlocal refused
        refused += bool(check(format_, path, content))

    run()
    assert refused  # changes are seen


@pytest.mark.parametrize("name", [*JSON, *BINARY])
def test_changed_files_are_read_or_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz(name, (JSON | BINARY)[name], tmp_path / "the_folder", 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*JSON, *BINARY])
def test_many_changed_files_are_read_or_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz(name, (JSON | BINARY)[name], tmp_path / "the_folder", 500)
