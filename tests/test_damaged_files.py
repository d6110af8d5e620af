"""What is wrong with a file is said: which file, which field, what to do (all kinds of damage: test_bad_input.py)."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ra3_trl import RA3Config
from ra3_trl.cli import report, show
from ra3_trl.cli.main import guarded
from ra3_trl.cli.parser import read_yaml
from ra3_trl.config_fields import own_fields
from ra3_trl.files import is_a, parse_json, read_lines, require_form
from ra3_trl.hub import ModelCardFacts, render_model_card
from ra3_trl.models import AbstractionHead, load_head, load_model
from ra3_trl.models.head import AbstractionConfig, save_head


@pytest.fixture
def checkpoint(tmp_path, tokenizers, tiny_model) -> Path:
    """A folder with weights, tokenizer, head and settings, and a text to show."""
    folder, tokenizer = tmp_path / "the_model", tokenizers["newline_indent"]
    tiny_model("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_head(AbstractionHead(AbstractionConfig(32)), folder)
    RA3Config(str(tmp_path / "run"), max_length=256, use_cpu=True, report_to="none").save_pretrained(str(folder))
    (tmp_path / "f.py").write_text("def f(x):\n    return x\n")
    return folder


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    content["settings"] |= values
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("value", [10**9, 10**30, -1, math.nan, "12", None, [12], True])
def test_a_setting_out_of_bounds_is_named_with_its_file(checkpoint, tmp_path, capsys, value):
    """`max_latent_length: 10**9` took 13 GB before anything was said."""
    change(checkpoint / "ra3_config.json", max_latent_length=value)
    assert guarded(show.main, [str(checkpoint), str(tmp_path / "f.py")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ra3_config.json of ") and "the_model" in line and "`max_latent_length` is" in line
    # What a flag says takes its place.
    assert guarded(show.main, [str(checkpoint), str(tmp_path / "f.py"), "--max_latent_length", "4"]) == 0


def test_every_number_of_ours_has_an_upper_bound():
    """Those that may be infinite have none."""
    for entry in fields(RA3Config):
        if entry.name in own_fields(RA3Config) and entry.type in ("int", "int | None", "float", "float | None"):
            bounds = entry.metadata["help"].bounds if hasattr(entry.metadata["help"], "bounds") else None
            assert bounds and (bounds["most"] < math.inf or "infinite" in bounds), entry.name


def test_weights_that_are_not_finite_are_refused(checkpoint):
    """They were scored without a word."""
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"`model.layers.1.mlp.up_proj.weight` in the weights of .*the_model.*finite"):
        load_model(str(checkpoint), None, None)


def test_a_head_that_is_not_finite_is_refused(checkpoint):
    path = checkpoint / "abstraction_head.safetensors"
    tensors = load_file(path)
    tensors["outer.bias"][0] = math.inf
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"abstraction_head.safetensors of .*the_model.* not finite"):
        load_head(str(checkpoint))


@pytest.mark.parametrize("length", [0, 4, 500, 20_000])
def test_weights_that_are_cut_are_named(checkpoint, length):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="the weights of .*the_model.* are damaged .*take another checkpoint"):
        load_model(str(checkpoint), None, None)


def test_lines_of_json_may_hold_separators(tmp_path):
    """U+2028, U+0085 and a form feed end no line, though `str.splitlines` thinks so."""
    path = tmp_path / "rows.jsonl"
    row = {"annotated_text": "x = '\u2028\u0085'\n", "latents": [{"line": 1, "text": " \u2029", "gain": None}]}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n\n" + json.dumps(row) + "\n", "utf-8")
    assert [where.rpartition(" ")[2] for where, _ in read_lines(path)] == ["1", "3"]
    out = tmp_path / "out"
    assert guarded(report.main, [str(path), "--output_dir", str(out)]) == 0 and (out / "report.html").is_file()


def test_forms_by_hand():
    assert is_a([{"a": 1}], list[dict[str, float]]) and not is_a([{"a": "1"}], list[dict[str, float]])
    assert not is_a(True, float) and not is_a(2**63, int) and is_a(None, dict[str, int] | None) and is_a(True, bool)
    with pytest.raises(TypeError, match="`b` is 'x'"):
        require_form({"a": 1, "b": "x"}, {"a": int, "b": float})
    with pytest.raises(KeyError):
        require_form({}, {"a": int})
    for text in ("[" * 100_000, b"\xff", "1" * 5000, '"\\ud800"', "{"):
        with pytest.raises(ValueError, match="^here is damaged .*; try again.$"):
            parse_json(text, "here", "try again")


def test_yaml_that_grows_is_refused(tmp_path):
    """Nine lists of nine names each stand for nine to the ninth values; an error would write them all."""
    path = tmp_path / "run.yaml"
    names = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(9)]
    path.write_text("\n".join(names))
    assert len(yaml.safe_load(path.read_text())) == 9
    with pytest.raises(ValueError, match=r"run.yaml stands for 5e\+08 values"):
        read_yaml(path, "--config")


def test_no_name_is_markup_on_a_card():
    evil = "<img src=x onerror=alert(1)>"
    facts = ModelCardFacts(model_name=evil, model_id=evil, base=evil, dataset_name=evil, dataset_license=evil)
    numbers = dict.fromkeys(("ce", "ce_policy", "elbo", "bound_multi", "think_rate", "gain"), 0.5)
    facts = replace(
        facts, abstraction_head=True, think=evil, row_licenses={evil: 1}, settings={"action_format": evil},
        counts={evil: {"documents": 1, "boundaries": 1, "tokens": 1}}, license=evil, tags=[evil],
        evaluations=[{"label": evil, "set": evil, "last": True, "step": 1, **numbers}],
        latents=[{"latent": evil, "line": evil, "gain": 0.5, "think_prob": 0.5, "step": 1}], latents_of=1,
    )  # fmt: skip
    for card in (render_model_card(facts), render_model_card(replace(facts, adapter=True))):
        assert "<img" not in card.text and "onerror" in card.text


def test_the_head_of_a_file_is_bounded(tmp_path):
    save_head(AbstractionHead(AbstractionConfig(8)), tmp_path)
    for name, value in (("hidden_size", 10**12), ("max_latent_length", 0), ("trained_on", -1), ("think_prob", 2.0)):
        path = tmp_path / "abstraction_config.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {name: value}))
        with pytest.raises(ValueError, match=f"abstraction_config.json of .*: `{name}` of the abstraction head is"):
            load_head(str(tmp_path))
        path.write_text(before)
    assert isinstance(load_head(str(tmp_path)), torch.nn.Module)
