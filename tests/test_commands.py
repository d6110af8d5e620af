"""The words of the commands: what is refused before torch is imported, short helps, the same names everywhere."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import resource
import shlex
import subprocess
import sys
from typing import get_type_hints

import pytest

import ra3_trl
from ra3_trl import RA3Config
from ra3_trl.cli import option_groups, options, rlvr, train
from ra3_trl.cli.early import refuse_early, trainer_fields
from ra3_trl.cli.helps import HELPS
from ra3_trl.cli.main import COMMANDS, main
from ra3_trl.cli.sources import PACKAGE, path_of, read_fields
from ra3_trl.evaluation import EvaluationSettings
from ra3_trl.evaluation.diagnose import DiagnosisSettings
from ra3_trl.experimental.hindsight import HindsightConfig
from ra3_trl.policy import THINKING


# ---- what is mistyped ----

MISTAKES = [
    ("train --model_name_or_path m --num_latent 3", "no option of `ra3 train`; did you mean `--num_latents`?"),
    ("train --model_name_or_path m --num_latents three", "invalid int value: 'three'"),
    ("train --model_name_or_path m --penalty=much", "argument --penalty: invalid float value: 'much'"),
    ("train --use_cpu", "`model_name_or_path` is missing"),
    ("train --model_name_or_path m --code_dir nowhere", "`code_dir` is 'nowhere', which is not a folder"),
    ("rlvr --model_name_or_path m --task mbpp --max_step 3", "did you mean `--max_steps`?"),
    ("annotate m --code_dir nowhere --output_dir out", "`code_dir` is 'nowhere', which is not a folder"),
    ("train --model_name_or_path m --dry_run --device tpu", "`device` is 'tpu'; choose one of a100, l40s, h100, h200"),
    ("train --model_name_or_path m --dry_run --device h100 --devices 0", "`devices` is 0; use at least 1"),
    ("train --model_name_or_path m --device h100", "`device` is 'h100', which is for an estimate; set `dry_run` too"),
    ("train --model_name_or_path m --devices 8", "`devices` is 8, which is for an estimate; set `dry_run` too"),
    ("train --model_name_or_path m --dry_run --devices 8", "`devices` is 8 without a `device`; name one"),
    ("train --model_name_or_path m --dry_run --device h100 --price_per_hour -1", "`price_per_hour` is -1.0; give"),
    ("annotate m --dry_run --device tpu", "argument --device: invalid choice: 'tpu'"),
    ("annotate m --output_dir out --device h100", "`device` is 'h100', which is for an estimate; set `dry_run` too"),
    ("annotate m --dry_run --device h100 --devices 0", "`devices` is 0; use at least 1"),
    ("annotate m --dry_run --device h100 --price_per_hour nan", "`price_per_hour` is nan; give dollars"),
    ("annotate m --num_latents many --output_dir out", "invalid int value: 'many'"),
    ("show m nothing.py", "`file` is 'nothing.py', which is not there"),
    ("show m", "the following arguments are required: FILE"),
    ("play m --port 0", "`port` is 0; use a number from 1 to 65,535"),
    ("play m --private", "`private` is True without a Space; set `--push_to_space ORG/NAME`"),
    ("evaluate m --think perhaps", "invalid choice: 'perhaps'"),
    ("compare a b --max_documents few", "invalid int value: 'few'"),
    ("diagnose m --boundary 3", "unrecognized arguments: --boundary 3"),
    ("report", "the following arguments are required: RUN"),
    ("report a=nowhere", "`run` 'nowhere' is not there"),
    ("train m", "unrecognized arguments: m"),
    ("train --model_name_or_path m --e_steps 3 more", "unrecognized arguments: more"),
    ("train --model_name_or_path m --e_steps", "argument --e_steps: expected one argument"),
    ("train --model_name_or_path m --e_steps -3", "`e_steps` is -3; it must be at least 0"),
    ("train --model_name_or_path m --top_p 2", "`top_p` is 2.0; it must be above 0 and at most 1"),
    ("train --model_name_or_path m --penalty nan", "`penalty` is nan; it must be at least 0"),
    ("train --model_name_or_path m --gradient_accumulation_steps 0", "`gradient_accumulation_steps` is 0; it must"),
    ("train --model_name_or_path m --existing_comments drop", "use one of 'keep', 'strip'"),
    ("train --model_name_or_path m --use_peft maybe", "argument --use_peft: invalid bool value: 'maybe'"),
    ("train --model_name_or_path ./m", "`model_name_or_path` is './m', a folder that is not there"),
    ("train --model_name_or_path m --dataset_name code.jsonl", "`dataset_name` is 'code.jsonl', but there is no such"),
    ("train --config run.yaml", "`config` is 'run.yaml', which is not there"),
    ("rlvr --model_name_or_path m", "`task` is None and `dataset_name` None"),
    ("rlvr --model_name_or_path m --task mbpp --think maybe", "argument --think: invalid choice: 'maybe'"),
    ("annotate m --num_latents 0 --output_dir out", "`num_latents` is 0; it must be at least 1"),
    ("annotate m", "neither `output_dir` nor `push_to_hub` is set"),
    ("show ./m nothing.py --lines 3", "`file` is 'nothing.py', which is not there"),
    ("evaluate", "`checkpoint` is None and `samples` None"),
    ("evaluate m --k 1,x", "`k` is '1,x'; give numbers with commas"),
    ("evaluate m --task mine.jsonl", "`task` is 'mine.jsonl', a file that is not there"),
    ("evaluate ./m", "`checkpoint` is './m', a folder that is not there"),
    ("compare a", "'a' is all there is to compare; give two or more"),
    ("compare a b --names x x", "two are called 'x'; tell them apart by `--names`"),
    ("diagnose m --horizon 0", "`horizon` is 0; it must be at least 1 and at most 1024"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "says"), MISTAKES)
def test_a_mistake_costs_no_import_of_torch(words, says, tmp_path):
    """In a process of its own: the message, and less than half a second of the CPU's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import sys; from ra3_trl.cli.main import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code\n"
        "assert code == 2 and 'torch' not in sys.modules, (code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words.split()], cwd=tmp_path, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and says in done.stderr, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("command", ["train", "rlvr"])
def test_what_the_sources_say_is_what_the_parser_has(command):
    """Each option of the real parser is in the sources, with its kind where that is a number: none is refused early
    that the command takes."""
    parser = (train if command == "train" else rlvr).make_parser()
    fields = trainer_fields(command)
    assert parser.option_names() <= set(fields)
    for dtype in parser.dataclass_types:
        for name, hint in get_type_hints(dtype).items():
            if name in fields and fields[name].hint in ("int", "float", "int | None", "float | None"):
                kind = {"int": int, "float": float}[fields[name].hint.partition(" | ")[0]]
                assert hint in (kind, kind | None), (name, hint, fields[name].hint)


def test_what_may_be_meant_is_left_to_the_command(tmp_path):
    (tmp_path / "code").mkdir()
    for words in (
        "--model_name_or_path m --accelerate_config a.yaml --num_processes 2",  # the launcher's option
        "--config run.yaml",  # which may name the model
        f"--model_name_or_path m --code_dir {tmp_path / 'code'} --max_boundaries none --no_packing",
        "--model_name_or_path m --use_vllm true --learning-rate 1e-5",  # TRL's, and dashes
        "--model_name_or_path m --lora_target_modules q_proj v_proj --model_init_kwargs {}",
        "--model_name_or_path m --penalty inf --max_length none --bf16 --use_cpu true --annotation none",
        "--model_name_or_path m --lora_target_modules q_proj v_proj k_proj --eval_on_start false --seed 0",
    ):
        refuse_early("train", words.split())
    (tmp_path / "a.py").write_text("x = 1\n")
    for command, words in {
        "show": f"org/m {tmp_path / 'a.py'} --lines 3: --max_length none", "report": f"a={tmp_path} {tmp_path}",
        "evaluate": "m --temperature 0 --task org/tasks", "annotate": "m --dry_run --prior_alpha none --seed 0",
        "compare": "a b --k 1,5 --eval_max_boundaries 0",
    }.items():  # fmt: skip
        refuse_early(command, words.split())


def test_bounds_and_choices_are_those_of_the_fields():
    """What the sources say of a setting's value is what `RA3Config` has."""
    for field in dataclasses.fields(RA3Config):
        meaning, said = field.metadata.get("help"), option_groups.RA3_FIELDS.get(field.name)
        if said is None or not hasattr(meaning, "bounds"):
            continue
        bounds = {key: meaning.bounds[key] for key in ("least", "most", "above", "infinite") if key in meaning.bounds}
        usual = {"least": None, "most": math.inf, "above": False}
        assert usual | dict(said.bounds) == usual | bounds, field.name
        assert said.choices == meaning.bounds.get("choices"), field.name


@pytest.mark.parametrize(
    ("fields", "config"),
    [(option_groups.RA3_FIELDS, RA3Config), (options.HINDSIGHT_FIELDS, HindsightConfig),
     (options.DIAGNOSIS_FIELDS, DiagnosisSettings), (option_groups.SAMPLING_FIELDS, EvaluationSettings)],
)  # fmt: skip
def test_flags_have_the_meaning_and_default_of_the_field(fields, config):
    assert option_groups.THINKING == THINKING
    real = {field.name: field for field in dataclasses.fields(config)}
    for name in {*options.ANNOTATE, *options.SHOW, *options.DIAGNOSE, *options.CROSS_ENTROPY, *fields} & set(fields):
        if name not in real or "help" not in real[name].metadata:
            continue
        assert real[name].metadata["help"].startswith(fields[name].text) and fields[name].text, name
        assert fields[name].default == real[name].default or fields[name].default is None, name


def test_a_class_or_file_that_is_not_there():
    assert read_fields(PACKAGE / "config.py", "Nobody") == {}
    assert path_of("transformers", "no_such_file.py") is None and path_of("no_such_package", "a.py") is None


PAGES = [PACKAGE.parent / "README.md", *sorted((PACKAGE.parent / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_are_taken(page):
    """Each `ra3 ...` of its shell blocks, with every option; what a reader has (folders, files) need not be there."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text("utf-8"), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            name, command, *words = [*shlex.split(line, comments=True), "", ""]
            if name != "ra3":
                continue
            words = words[:-2]
            if command in options.PARSERS:
                options.PARSERS[command]().parse_args(words)
            elif "--accelerate_config" not in words:
                known = {f"--{field}" for field in trainer_fields(command)} | {"--config"}
                assert {word for word in words if word.startswith("--")} <= known, line


# ---- helps ----


@pytest.mark.parametrize("words", ["env", "train --help"])
def test_nothing_is_said_of_a_reader_that_has_gone(words):
    """As behind `| head -1`: 141 is what the shell has of other tools."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "ra3_trl.cli.main", *words.split()]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_short_help(command, capsys):
    """At most 25 lines, three examples, each of which the command's parser takes; and where the rest is."""
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: ra3 {command}") and len(lines) <= 25 and max(map(len, lines)) <= 119
    assert lines[-1] == f"All options: ra3 {command} --help-all"
    assert len([line for line in lines if line.startswith(f"  ra3 {command}")]) == (1 if command == "env" else 3)
    for example in HELPS[command].examples:
        if command in options.PARSERS:
            options.PARSERS[command]().parse_args(shlex.split(example))


def test_the_help_of_all_has_three_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    examples = re.findall(r"^  ra3 (\w+)", said[said.index("examples:") :], re.M)
    assert len(examples) == 3 and set(examples) <= set(COMMANDS) and all(f"    {name}" in said for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(options.PARSERS))
def test_the_whole_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help-all"])
    assert stop.value.code == 0
    named = set(re.findall(r"--(\w+)", " ".join(option for option, _ in HELPS[command].options)))
    assert named <= set(re.findall(r"--(\w+)", capsys.readouterr().out))


@pytest.mark.parametrize("command", ["train", "rlvr"])
def test_the_short_help_of_a_run_names_its_options(command):
    parser = (train if command == "train" else rlvr).make_parser()
    text = HELPS[command].text(command)
    assert set(re.findall(r"--(\w+)", text)) - {"help", "config"} <= parser.option_names()


# ---- the same words ----


@pytest.mark.parametrize("command", ["annotate", "diagnose", "compare"])
def test_the_same_words_for_corpus_and_output(command):
    """`--code_dir`, `--max_documents`, `--output_dir`; former names are taken."""
    places = {"annotate": "m", "diagnose": "m", "compare": "a b"}[command]
    parse = options.PARSERS[command]().parse_args
    parsed = parse(f"{places} --code_dir c --max_documents 3 --output_dir o".split())
    former = {"annotate": "--output o", "diagnose": "--documents 3", "compare": "--eval_documents 3"}[command]
    name, value = former.removeprefix("--").split()
    again = vars(parse(f"{places} {former}".split()))
    assert parsed.code_dir == "c" and parsed.output_dir == "o"
    assert (
        str(again["output_dir" if name == "output" else name])
        == value
        == str(vars(parsed)["output_dir" if name == "output" else name])
    )


def test_train_takes_the_first_documents(tmp_path):
    from trl import DatasetMixtureConfig

    for i in range(3):
        (tmp_path / f"{i}.py").write_text(f"def f{i}(x):\n    y = x\n    y += {i}\n    return y\n")
    script = train.RA3ScriptArguments(code_dir=str(tmp_path), max_documents=2, eval_documents=0)
    data, held_out = train.load_data(script, DatasetMixtureConfig(), 0)
    assert len(data) == 2 and held_out is None
    with pytest.raises(ValueError, match="`max_documents` is 0; it must be at least 1"):
        train.RA3ScriptArguments(max_documents=0)


def test_dir_shows_the_public_names():
    assert dir(ra3_trl) == sorted(ra3_trl.__all__) and "RA3MidTrainer" in dir(ra3_trl)
    assert all(getattr(ra3_trl, name) is not None for name in dir(ra3_trl))


def test_env_begins_with_the_version(capsys, monkeypatch):
    """That of the package; where the checkout has moved on since it was installed, both."""
    from ra3_trl.cli import env

    version = re.search(r'^version = "(.*)"', (PACKAGE.parent / "pyproject.toml").read_text(), re.M)[1]
    monkeypatch.setattr(env, "_version", lambda package: version)
    assert main(["env"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert lines[0] == f"- ra3-trl: {version}"
    monkeypatch.setattr(env, "_version", lambda package: "0.0.1")
    assert env._own_version() == f"0.0.1 (the checkout is {version}: install it again, `pip install -e .`)"
