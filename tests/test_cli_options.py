"""`ra3 train` takes every field as a flag and from YAML; mixtures of data; reward functions; dry runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import NoneType
from typing import get_type_hints

import datasets
import pytest
import yaml
from transformers import TrainingArguments
from trl import DatasetMixtureConfig, ModelConfig

from ra3_trl import RA3Config
from ra3_trl.cli import main, run, train
from ra3_trl.cli.data import load_mixture
from ra3_trl.cli.estimate import estimate
from ra3_trl.cli.parser import may_be
from ra3_trl.cli.rewards import load_reward_funcs
from ra3_trl.report.estimate import render


TYPES = (train.RA3ScriptArguments, RA3Config, ModelConfig, DatasetMixtureConfig)
FIELDS = {f.name: t for t in (*TYPES, TrainingArguments) for f in dataclasses.fields(t) if f.init}
HINTS = {name: get_type_hints(owner)[name] for name, owner in FIELDS.items()}
MAPPINGS = [name for name, hint in HINTS.items() if may_be(hint, dict)]
LISTS = [name for name, hint in HINTS.items() if may_be(hint, list)]
NONES = [name for name, hint in HINTS.items() if may_be(hint, NoneType)]
TEXT = "def f{i}(x):\n    y = x + {i}\n    if y > 3:\n        return y\n    return x\n"
SMALL = [
    "--use_cpu", "--max_length", "128", "--max_latent_length", "3", "--num_latents", "2", "--e_steps", "1",
    "--m_steps", "1", "--report_to", "none", "--per_device_train_batch_size", "2", "--max_boundaries", "2",
    "--eval_max_boundaries", "1", "--log_latents_steps", "0", "--disable_tqdm", "true", "--save_strategy", "no",
]  # fmt: skip


@pytest.fixture(scope="module")
def parser():
    return train.make_parser()


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizers, tiny_model) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", tokenizers["newline_indent"], max_position_embeddings=256).save_pretrained(folder)
    tokenizers["newline_indent"].save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """8 rows of JSON and 4 of parquet, with numbers 0-7 and 100-103 in them."""
    folder = tmp_path_factory.mktemp("files")
    rows = {"rows.jsonl": range(8), "rows.parquet": range(100, 104)}
    made = {name: datasets.Dataset.from_dict({"text": [TEXT.replace("{i}", str(i)) for i in of]}) for name, of in
            rows.items()}  # fmt: skip
    made["rows.jsonl"].to_json(folder / "rows.jsonl")
    made["rows.parquet"].to_parquet(folder / "rows.parquet")
    return {name: str(folder / name) for name in rows}


def value_of(parser, name: str, *words: str):
    found, unknown = parser.parse_known_args([f"--{name}", *words])
    assert unknown == []
    return vars(found)[name]


def from_yaml(tmp_path, name: str, value):
    """The field's value with `name: value` in a YAML file, before any dataclass is made."""
    parser = train.make_parser()
    parser.set_defaults_with_config(**yaml.safe_load(yaml.safe_dump({name: value})))
    return vars(parser.parse_known_args([])[0])[name]


# ---- every field ----


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_field_has_an_option(parser, name):
    """And its help holds no bare %, which would end `--help` with an error."""
    (action,) = [a for a in parser._actions if a.dest == name and f"--{name}" in a.option_strings]
    assert action.help
    assert "%" not in action.help.replace("%%", "").replace("%(default)s", "")


def test_the_fields_are_those_of_the_dataclasses():
    """The parametrised tests below test something."""
    known = {"model_init_kwargs", "lr_scheduler_kwargs", "activation_checkpointing_kwargs", "accelerator_config",
             "gradient_checkpointing_kwargs", "fsdp_config", "deepspeed", "liger_kernel_config",
             "dataset_kwargs"}  # fmt: skip
    assert known == set(MAPPINGS)
    assert {"report_to", "lora_target_modules", "reward_funcs", "reward_weights", "datasets"} <= set(LISTS)
    assert len(FIELDS) > 150
    assert len(NONES) > 60


@pytest.mark.parametrize("name", MAPPINGS)
def test_mappings(parser, tmp_path, name):
    value = {"a": 1, "b": {"c": [0.5, True, None]}}
    assert value_of(parser, name, json.dumps(value)) == value
    assert from_yaml(tmp_path, name, value) == value
    assert from_yaml(tmp_path, name, json.dumps(value)) == value
    assert value_of(parser, name, "none") is None
    with pytest.raises(ValueError, match=f"`{name}` is '{{\"a\": ', which is not JSON"):
        value_of(parser, name, '{"a": ')


def test_a_path_may_stand_for_some_mappings(parser):
    assert value_of(parser, "deepspeed", "zero3.json") == "zero3.json"
    with pytest.raises(ValueError, match="`model_init_kwargs` is 'x.json', which is not JSON"):
        value_of(parser, "model_init_kwargs", "x.json")
    with pytest.raises(ValueError, match=r"`model_init_kwargs` is '\[1\]'; it takes a mapping"):
        value_of(parser, "model_init_kwargs", "[1]")


@pytest.mark.parametrize("name", [n for n in LISTS if n not in ("datasets", "reward_weights", "debug")])
def test_lists_of_words(parser, tmp_path, name):
    for words in (["a", "b"], ['["a", "b"]']):
        assert value_of(parser, name, *words) == ["a", "b"]
    assert from_yaml(tmp_path, name, ["a", "b"]) == ["a", "b"]
    assert value_of(parser, name, '["a"]') == ["a"]
    assert value_of(parser, name, "a") in ("a", ["a"])  # one word where the field may hold one
    assert from_yaml(tmp_path, name, "a") == value_of(parser, name, "a")


def test_lists_of_numbers(parser, tmp_path):
    for words in (["-1", "0.5"], ["[-1, 0.5]"]):
        assert value_of(parser, "reward_weights", *words) == [-1.0, 0.5]
    assert from_yaml(tmp_path, "reward_weights", [-1, 0.5]) == [-1.0, 0.5]
    with pytest.raises(ValueError, match="`reward_weights` holds 'x', which is no float"):
        value_of(parser, "reward_weights", "1", "x")


def test_data_sets_of_a_mixture(parser, tmp_path):
    sources = [{"path": "json", "data_files": "a.json"}, {"path": "b/c", "columns": ["text"]}]
    assert value_of(parser, "datasets", json.dumps(sources)) == sources
    assert value_of(parser, "datasets", *map(json.dumps, sources)) == sources
    assert from_yaml(tmp_path, "datasets", sources) == sources
    with pytest.raises(ValueError, match="`datasets` is 'b/c'|`datasets` holds"):
        value_of(parser, "datasets", "[1]")


@pytest.mark.parametrize("name", [name for name in NONES if name != "report_to"])
def test_none_can_be_given(parser, tmp_path, name):
    assert value_of(parser, name, "none") is None
    assert from_yaml(tmp_path, name, None) is None


def test_no_tracker_is_a_value_of_its_own(parser, tmp_path):
    assert value_of(parser, "report_to", "none") == from_yaml(tmp_path, "report_to", None) == "none"
    assert RA3Config(report_to=value_of(parser, "report_to", "none"), use_cpu=True).report_to == []


def test_values_of_yaml_are_read_strictly(tmp_path):
    assert from_yaml(tmp_path, "save_strategy", False) == "no"  # a bare `no`
    assert from_yaml(tmp_path, "packing", False) is False
    for name, value in (("num_latents", True), ("packing", 3)):
        with pytest.raises(SystemExit):
            from_yaml(tmp_path, name, value)
    with pytest.raises(ValueError, match=r"`num_latents` is \[1, 2\]; it takes a single value"):
        from_yaml(tmp_path, "num_latents", [1, 2])


def test_values_reach_the_dataclasses(parser):
    """Through TrainingArguments' and ModelConfig's own checks."""
    argv = [
        "--use_cpu",
        "--lr_scheduler_type",
        "cosine_with_restarts",
        "--lr_scheduler_kwargs",
        '{"num_cycles": 2}',
        "--accelerator_config",
        '{"split_batches": true}',
    ]
    argv += [
        "--activation_checkpointing_kwargs",
        '{"use_reentrant": false}',
        "--model_init_kwargs",
        '{"subfolder": "x"}',
    ]
    argv += ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]
    argv += ["--report_to", "tensorboard", "--reward_weights", "1", "0.5"]
    script, args, model, mixture = parser.parse_args_and_config(argv)
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert args.accelerator_config.split_batches is True
    assert (args.report_to, args.model_init_kwargs) == (["tensorboard"], {"subfolder": "x"})
    assert args.reward_weights == [1.0, 0.5]
    assert (model.use_peft, model.lora_r, model.lora_target_modules) == (True, 4, ["q_proj", "v_proj"])


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--load_in_4bit"], ["`load_in_4bit` is true", "pip install bitsandbytes"]),
        (["--load_in_8bit"], ["`load_in_8bit` is true", "leave it out"]),
        (["--reward_funcs", "no_such_module.f"], ["'no_such_module.f'", "`import no_such_module` fails"]),
        (["--reward_funcs", "os.path.no_such"], ["`os.path` has no `no_such`", "join"]),
        (["--reward_funcs", "f"], ["'f', which is no import path"]),
        (["--reward_funcs", "os.sep"], ["'os.sep', which is '/' and not a function"]),
        (["--datasets", '{"path": "x"}', "--dataset_name", "y"], ["`datasets` and `dataset_name` 'y'", "pass one"]),
        (["--datasets", '{"path": "x"}', "--code_dir", "y"], ["`datasets` and `code_dir` 'y'"]),
        (["--datasets", '{"path": "no.jsonl"}'], ["`datasets[0].path` is 'no.jsonl'", "no such file"]),
        (["--datasets", '{"path": "json", "data_files": "/no/rows.json"}'], ["`datasets`: ", "/no/rows.json"]),
        (["--model_init_kwargs", "{"], ["`model_init_kwargs` is '{'", "not JSON"]),
        (["--datasets", '{"paths": "x"}'], ["`datasets`", "paths"]),
    ],
    ids=lambda value: "-".join(value).strip("-").split("{")[0][:40],
)  # fmt: skip
def test_bad_options_are_refused(model, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.setattr(run, "is_bitsandbytes_available", lambda: False)
    output = tmp_path / "out"
    assert main.main(["train", "--model_name_or_path", model, "--output_dir", str(output), "--use_cpu", *options]) == 2
    said = capsys.readouterr().err
    assert [word for word in words if word not in said] == []
    assert "Traceback" not in said
    assert not output.exists()


# ---- reward functions ----


def test_reward_functions_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_ra3_rewards.py").write_text("def short(completions, **kwargs):\n    return [1.0]\nNUMBER = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    short, parse = load_reward_funcs(["my_ra3_rewards.short", "json.loads"])
    assert short([]) == [1.0]
    assert parse is json.loads
    assert load_reward_funcs(None) is None
    with pytest.raises(ValueError, match="`my_ra3_rewards` has no `shorter`; it has short."):
        load_reward_funcs(["my_ra3_rewards.shorter"])


def test_bad_reward_functions_are_refused_before_the_model_loads(tmp_path, capsys):
    argv = [
        "--model_name_or_path",
        "no/such-model",
        "--use_cpu",
        "--reward_funcs",
        "os.no",
        "--output_dir",
        str(tmp_path),
    ]
    assert main.main(["train", *argv]) == 2
    assert "`os` has no `no`" in capsys.readouterr().err


# ---- mixtures ----


def mixture(files, **settings) -> DatasetMixtureConfig:
    return DatasetMixtureConfig(
        datasets=[{"path": "json", "data_files": files["rows.jsonl"]}, {"path": files["rows.parquet"]}], **settings
    )


def test_a_mixture_holds_its_sources(files):
    assert len(load_mixture(mixture(files), 0)["train"]) == 8 + 4
    sliced = mixture(files)
    sliced.datasets[0].split = "train[:2]"
    assert len(load_mixture(sliced, 0)["train"]) == 2 + 4
    # Half each: the 4 rows of the smaller and as many of the other.
    halves = mixture(files)
    for source in halves.datasets:
        source.fraction = 0.5
    assert len(load_mixture(halves, 0)["train"]) == 4 + 4
    assert next(iter(load_mixture(mixture(files, streaming=True), 0)["train"]))["text"] == TEXT.replace("{i}", "0")


def test_a_mixture_of_two_kinds_of_strings_says_how_to_make_them_one(files, tmp_path):
    """`large_string`, as pandas 3 writes; and the cure works."""
    rows, path = datasets.Dataset.from_dict({"text": ["x = 1\n"]}), str(tmp_path / "large.parquet")
    rows.cast_column("text", datasets.Value("large_string")).to_parquet(path)
    mixed = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": files["rows.jsonl"]}, {"path": path}])
    with pytest.raises(ValueError, match=r"`datasets`: .*cast_column\(\"text\", datasets.Value\(\"string\"\)\)"):
        load_mixture(mixed, 0)
    rows.cast_column("text", datasets.Value("string")).to_parquet(path)
    assert len(load_mixture(mixed, 0)["train"]) == 8 + 1


def test_a_mixture_is_split_by_the_seed(files):
    """Processes, and a run that goes on, must hold out the same rows; trl's split is another each time."""
    tests = [load_mixture(mixture(files, test_split_size=0.25), seed)["test"]["text"][:] for seed in (3, 3, 4)]
    assert len(tests[0]) == 3  # a quarter of 12
    assert tests[0] == tests[1] != tests[2]
    assert len(load_mixture(mixture(files, test_split_size=2), 0)["test"]) == 2
    with pytest.raises(ValueError, match="`test_split_size` is 0.1 .*set `eval_documents`"):
        load_mixture(mixture(files, test_split_size=0.1, streaming=True), 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_train_on_a_mixture(model, files, tmp_path, monkeypatch, streaming):
    monkeypatch.chdir(tmp_path)
    config = {
        "model_name_or_path": model, "eval_documents": 2, "streaming": streaming, "output_dir": "out",
        "datasets": [{"path": "json", "data_files": [files["rows.jsonl"]]}, {"path": files["rows.parquet"]}],
    }  # fmt: skip
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert main.main(["train", "--config", "config.yaml", *SMALL]) == 0
    results = json.loads(Path("out/all_results.json").read_text())
    assert results["eval_code_tokens"] > 10
    card = Path("out/README.md").read_text()
    assert "Trained on rows.jsonl, rows.parquet." in card
    assert "datasets:" not in card  # no names of the Hub


# ---- dry runs ----


@pytest.mark.parametrize(
    "options",
    [["--dataset_streaming", "true"], ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]],
    ids=["stream", "adapter"],
)
def test_dry_runs(model, files, tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    argv = ["--model_name_or_path", model, "--dataset_name", files["rows.jsonl"], *SMALL, "--eval_documents", "2"]
    assert main.main(["train", *argv, *options, "--dry_run"]) == 0
    said = capsys.readouterr().out
    stream = "--dataset_streaming" in options
    assert ("a stream; its first 6 chunks stand for the rest" in said) == stream  # 8 rows less 2 held out
    assert ("6 to train on" in said) != stream
    assert "Time " in said
    assert list(tmp_path.iterdir()) == []


def test_dry_run_with_a_dict_of_evaluation_sets(model, files, tmp_path):
    from ra3_trl import RA3MidTrainer

    rows = datasets.Dataset.from_json(files["rows.jsonl"])
    args = RA3Config(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=128, e_steps=1,
                     num_latents=2, max_latent_length=3, per_device_train_batch_size=2)  # fmt: skip
    evaluation = {"a": rows.select([0]), "b": rows.select([1, 2])}
    found = estimate(RA3MidTrainer(model, args, rows.select(range(3, 8)), evaluation))
    assert found.held_out == 1 + 2
    assert "5 to train on" in render(found)
    assert "3 held out" in render(found)
