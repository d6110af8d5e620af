"""The model card: its facts, its metadata as the Hub reads them, and its snippets, which run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import shlex
import string
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt
from peft import LoraConfig

from ra3_trl import RA3Config
from ra3_trl.cli.early import trainer_fields
from ra3_trl.cli.options import PARSERS
from ra3_trl.hub import ModelCardFacts, all_evaluations, card_facts, render_model_card
from ra3_trl.hub.card import (
    best_latents,
    count_licenses,
    evaluated_sets,
    evaluation_rows,
    hub_ids,
    mean_logged,
    public_name,
)
from ra3_trl.hub.licenses import HUB_LICENSES, hub_license, license_metadata, row_license
from ra3_trl.markdown import cell, code_cell
from ra3_trl.report import LatentLog
from ra3_trl.report.latents import latent_table


ROOT = Path(__file__).parents[1]
TEXTS = ["def f(x):\n    y = x + 1\n    if y > 2:\n        return y\n    return x\n", "a = 1\nb = a\n"] * 2
COUNTS = {"train": {"documents": 8, "boundaries": 20, "tokens": 300}}
METRICS = ("ce", "ce_policy", "elbo", "bound_multi", "think_rate", "gain")
NASTY = "``|<script>alert(1)</script>{{ 7 * 7 }}*b*_i_[x](http://e.vil)www.e.vil a@b.c\u202e\\|~~~"


def metrics(ce: float, prefix: str = "eval") -> dict[str, float]:
    return {f"{prefix}_{name}": ce + i for i, name in enumerate(METRICS)}


def facts(**changes) -> ModelCardFacts:
    return dataclasses.replace(ModelCardFacts("My Model", "org/mine", "Coder", "org/Coder", counts=COUNTS), **changes)


def card_of(
    tmp_path, evaluations=(), dataset_name=None, source=None, latents=(), base="org/Coder", **extra
) -> ModelCard:
    """The card on disk of a trainer that is not there."""
    config = SimpleNamespace(_name_or_path=base)
    trainer = SimpleNamespace(
        args=RA3Config(output_dir=str(tmp_path), use_cpu=True), evaluations=list(evaluations),
        cut=SimpleNamespace(counts=COUNTS),
        state=SimpleNamespace(log_history=[], global_step=4, num_input_tokens_seen=1234),
        loop=SimpleNamespace(learner=None),
        source_dataset=source, hub_model_id=None, latent_log=SimpleNamespace(latest=lambda step: list(latents)),
        policy=SimpleNamespace(backbone=SimpleNamespace(model=None, causal_lm=SimpleNamespace(config=config))),
    )  # fmt: skip
    render_model_card(card_facts(trainer, dataset_name=dataset_name, **extra)).save(tmp_path / "README.md")
    return valid(ModelCard.load(tmp_path / "README.md"))


def valid(card: ModelCard) -> ModelCard:
    """What the Hub's validation asks of the metadata, as far as that needs no network."""
    block = re.match(r"---\n(.*?)\n---\n", str(card), re.S)[1]
    data = yaml.safe_load(block)
    assert not re.search(r"[:\s]-?\.(nan|inf)\b", block)
    licenses = data.get("license", [])
    assert set([licenses] if isinstance(licenses, str) else licenses) <= HUB_LICENSES
    assert re.fullmatch(r"[a-z0-9.-]+", data.get("license_name", "none"))
    assert data["pipeline_tag"] == "text-generation" and data["library_name"] in ("transformers", "peft")
    assert all(isinstance(tag, str) and tag for tag in data["tags"])
    for name in [data.get("base_model", "a/b"), *data.get("datasets", [])]:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    assert data.get("base_model_relation", "finetune") in ("finetune", "adapter")
    assert ("base_model" in data) == ("base_model_relation" in data)
    for index in data.get("model-index", []):
        for result in index["results"]:
            assert result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
            assert all(m["type"] and math.isfinite(m["value"]) and m["verified"] is False for m in result["metrics"])
    return card


# ---- evaluations ----


def test_sets_of_an_evaluation():
    assert evaluated_sets({"loss": 1.0, "estep/elbo": 2.0}) == []
    assert evaluated_sets({**metrics(1.0), "step": 3}) == ["eval"]
    assert evaluated_sets({**metrics(1.0, "eval_a"), **metrics(2.0, "eval_my_set")}) == ["eval_a", "eval_my_set"]


def test_rows_are_the_first_and_the_last_of_each_set():
    """Whether the sets were logged together or one by one, as `Trainer` does."""
    one_by_one = [metrics(2.0, "eval_a") | {"step": 0}, metrics(3.0, "eval_b") | {"step": 0},
                  metrics(1.5, "eval_a") | {"step": 5}, metrics(1.0, "eval_a") | {"step": 9}]  # fmt: skip
    together = [one_by_one[0] | one_by_one[1], *one_by_one[2:]]
    for evaluations in (one_by_one, together):
        rows = evaluation_rows(evaluations)
        assert [(row["label"], row["step"], row["ce"]) for row in rows] == [
            ("first evaluation of a", 0, 2.0), ("last evaluation of a", 9, 1.0), ("last evaluation of b", 0, 3.0),
        ]  # fmt: skip
    assert [row["label"] for row in evaluation_rows([metrics(2.0) | {"step": 0}] * 2)] == [
        "first evaluation", "last evaluation",
    ]  # fmt: skip


def test_evaluations_of_the_log_and_of_the_trainer():
    """A run that was resumed at update 4: its log has update 2, and the trainer what came after (and before)."""
    own = [metrics(1.5) | {"step": 6}, metrics(1.5) | {"step": 8}]
    log = [{"loss": 3.0, "step": 1}, metrics(2.0) | {"step": 2}, metrics(1.5) | {"step": 6, "epoch": 1.0}]
    assert [(entry["step"], entry["eval_ce"]) for entry in all_evaluations(log, own)] == [(2, 2.0), (6, 1.5), (8, 1.5)]
    of_two = [metrics(2.0, "eval_b") | {"step": 0}, metrics(1.0, "eval_a") | {"step": 0}]
    assert len(all_evaluations(of_two, of_two)) == 2
    assert all_evaluations([], []) == []


def test_rows_reach_the_card(tmp_path):
    text = card_of(tmp_path, [metrics(2.0, "eval_a") | {"step": 4}]).content
    assert "| last evaluation of a (update 4) | 2.0000 | 3.0000 | 4.0000 | 5.0000 | 6.0000 | +7.000 |" in text
    assert "saw 1,234 tokens" in text and "saw" not in render_model_card(facts()).content
    assert "thinks at 600.00 % of the boundaries of a." in text
    assert "Not evaluated" not in text and "In the M-phases" not in text
    assert "Not evaluated on held-out code" in card_of(tmp_path).content


def test_what_latents_say_reaches_the_card(tmp_path):
    """A log of two M-updates: (0.1 + 0.3) / 2 of the boundaries got a latent, which bring (1 + 2) / 2 nats."""
    said = {"eval_gain_over_other": 0.25, "eval_distinct_rate": 0.5, "eval_most_frequent_rate": 0.375}
    card = card_of(tmp_path, [metrics(2.0) | said | {"step": 4}])
    assert "| +7.000 | +0.250 | 50 %, 38 % |" in card.content
    assert {r.metric_type: r.metric_value for r in card.data.eval_results}["gain_over_other"] == 0.25
    log = [{"mstep/annotated_rate": 0.1, "mstep/placed_gain": 1.0}, {"estep/gain": 9.0},
           {"mstep/annotated_rate": 0.3, "mstep/placed_gain": 2.0}]  # fmt: skip
    values = {name: mean_logged(log, f"mstep/{name}") for name in ("annotated_rate", "placed_gain")}
    text = render_model_card(facts(**values)).content
    assert "In the M-phases 20.0 % of the boundaries got a latent; those placed bring +1.50 nats on average." in text
    assert mean_logged(log, "mstep/loss") is None


def test_results_come_back_from_the_metadata(tmp_path):
    """The last evaluation of each set; sets are results apart, and what is not finite is left out."""
    evaluations = [metrics(9.0, "eval_a") | {"step": 0}, metrics(2.0, "eval_a") | {"step": 4}]
    evaluations += [metrics(1.00004, "eval_b") | {"step": 4, "eval_b_gain": math.nan, "eval_b_elbo": math.inf}]
    found = card_of(tmp_path, evaluations).data
    values = {(result.dataset_name, result.metric_type): result.metric_value for result in found.eval_results}
    assert found.model_name == tmp_path.name
    assert [values["a", name] for name in METRICS] == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert [values.get(("b", name)) for name in METRICS] == [1.0, 2.0, None, 4.0, 5.0, None]  # 4 digits: 1.00004 is 1
    assert {result.task_type for result in found.eval_results} == {"text-generation"}
    assert {result.verified for result in found.eval_results} == {False}
    alone = card_of(tmp_path, [metrics(2.0) | {"step": 4}]).data.eval_results
    assert {(result.dataset_type, result.dataset_name) for result in alone} == {("held-out-code", "held-out code")}
    assert card_of(tmp_path).data.eval_results is None


# ---- names and licences ----


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("bigcode/the-stack-smol", ["bigcode/the-stack-smol"]),
        ("org/a, org/b", ["org/a", "org/b"]),
        ("rows.jsonl", None),  # a file's name
        ("src", None),  # a folder's name
        ("rows.jsonl, org/a", ["org/a"]),
        ("/data/rows", None),
        ("../rows", None),
        ("the Python standard library", None),
        (None, None),
    ],
)
def test_only_names_of_the_hub_are_metadata(tmp_path, name, ids):
    card = card_of(tmp_path, dataset_name=name)
    assert card.data.datasets == ids
    assert "/data" not in card.content  # a machine's folders are nobody's business


def test_a_folder_of_two_names_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "code").mkdir(parents=True)
    assert card_of(tmp_path, dataset_name="my/code").data.datasets is None
    assert card_of(tmp_path, dataset="org/a").data.datasets == ["org/a"]
    assert hub_ids(["my/code", "org/a", "org/a"]) == ["org/a"]
    assert public_name(str(tmp_path / "my")) == "my" and public_name("my/code") == "code"


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/code", "org/code"),
        ("The Stack v2 / Python, deduplicated", "The Stack v2 / Python, deduplicated"),
        ("org/a,org/b", "org/a, org/b"),
        ("/clients/acme", "acme"),
        ("/clients/acme/", "acme"),
        ("/clients/acme,org/b, ../clients/other.jsonl", "acme, org/b, other.jsonl"),
        ("./clients/acme", "acme"),
        ("~/clients/acme", "acme"),
        ("file:///clients/acme.parquet", "acme.parquet"),
        ("file:acme.parquet", "acme.parquet"),
        (r"C:\clients\acme", "acme"),
        ("clients/acme", "acme"),  # it is there
        ("clients/a, b/acme", "acme"),
        ("clients/nobody", "clients/nobody"),  # it is not: a name of the Hub
        ("~somebody", "a folder"),
        ("..", "a folder"),
        ("x" * 5000, "x" * 5000),  # longer than a file's name may be
    ],
)
def test_public_names(tmp_path, monkeypatch, name, public):
    monkeypatch.chdir(tmp_path)
    for folder in ("clients/acme", "clients/a, b/acme"):
        (tmp_path / folder).mkdir(parents=True)
    assert public_name(name) == public


def test_an_argument_that_a_card_does_not_have(tmp_path):
    with pytest.raises(ValueError, match=r"no \['licence'\]; it takes .*'license'"):
        card_of(tmp_path, licence="mit")
    card_of(tmp_path, tasks="text-generation")  # of `Trainer.create_model_card`


def test_a_local_base_is_named_and_not_linked(tmp_path):
    local = card_of(tmp_path, base=str(tmp_path))
    assert "base_model" not in local.data.to_dict()
    assert local.content.count(tmp_path.name) > 1 and str(tmp_path.parent) not in local.content
    linked = card_of(tmp_path, base="org/Coder")
    assert linked.data.base_model == "org/Coder" and linked.data["base_model_relation"] == "finetune"
    assert "[Coder](https://huggingface.co/org/Coder)" in linked.content


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("MIT", "mit"),
        ("The MIT License (MIT)", "mit"),
        ("Apache License, Version 2.0", "apache-2.0"),
        ("GPL-3.0-or-later", "gpl-3.0"),
        ("BSD 3-Clause License", "bsd-3-clause"),
        ("PSF-2.0", "other"),
        ("Copyright (c) 2020, Somebody", "other"),
        ("openrail++", "openrail++"),
    ],
)
def test_licences_of_the_hub(name, known):
    assert hub_license(name) == known
    assert hub_license(known) == known


def test_licences_in_the_metadata():
    assert license_metadata([]) == {}
    assert license_metadata(["MIT"]) == {"license": "mit"}
    assert license_metadata(["PSF-2.0"]) == {"license": "other", "license_name": "psf-2.0"}
    assert license_metadata(["MIT", "PSF-2.0", "(MIT OR Apache-2.0)"]) == {"license": ["apache-2.0", "mit", "other"]}
    assert license_metadata(["許諾"]) == {"license": "other"}
    assert valid(render_model_card(facts(license="My own, with conditions"))).data.license == "other"
    assert valid(render_model_card(facts(license="apache-2.0"))).data.license == "apache-2.0"


def test_licences_of_rows():
    assert [row_license(v) for v in ("MIT ", "", None, "Unknown", ["MIT", "ISC"], [], ["none"])] == [
        "MIT", None, None, None, "MIT AND ISC", None, None,
    ]  # fmt: skip
    rows = Dataset.from_dict({"text": ["a"] * 4, "license": ["MIT", "ISC", "MIT", None]})
    assert list(count_licenses(rows).items()) == [("MIT", 2), ("ISC", 1), ("unknown", 1)]
    assert count_licenses(rows.remove_columns("license")) == count_licenses(None) == {}
    text = render_model_card(facts(row_licenses=count_licenses(rows))).content
    assert "| MIT | 2 |\n| ISC | 1 |\n| unknown | 1 |" in text
    text = render_model_card(facts(row_licenses={f"L{i}": 1 for i in range(23)})).content
    assert "| 3 others | 3 |" in text


# ---- latents ----


def test_latents_cannot_break_the_card():
    row = {"step": 4, "latent": NASTY, "line": "x = `a` | b", "gain": 1.234, "think_prob": 0.5}
    text = render_model_card(facts(latents=[row], latents_of=9)).content
    assert "after 4 updates, the best at 1 of 9 boundaries" in text
    (line,) = (line for line in text.split("\n") if "+1.23" in line)
    assert line.count("|") == 5  # four cells
    assert not set("<>`{}[]*~\\") & set(re.sub(r"</?code>", "", line))
    assert "://" not in line and "www." not in line and "@" not in line and "\u202e" not in line
    assert code_cell("a_b = f(x, 1.5)") == "<code>a_b = f(x, 1.5)</code>"
    assert cell("a|b\n\tc") == "a&#124;b c" and len(cell("x" * 100)) == 80
    assert "__" not in cell("__init__")


CELLS = [NASTY, string.punctuation, "__a__ _b_ a_b **c** # d", "# é [ü](ß) 漢|字", "&lt;<br>"]


@pytest.mark.parametrize("text", CELLS)
def test_cells_show_what_they_hold(text):
    """By the parser that `rich` brings: one cell, no markup but `code`, the text letter for letter."""
    table = f"| a | b |\n|---|---|\n| {code_cell(text, 200)} | {cell(text, 200)} |"
    html = MarkdownIt("commonmark").enable("table").render(table)
    cells = re.findall(r"<td>(.*?)</td>", html, re.S)
    assert len(cells) == 2 and cells[0] == f"<code>{cells[1]}</code>" and "<" not in cells[1]
    assert unescape(cells[1]) == text.replace("\u202e", "\\u202e")


def test_the_best_latent_of_each_boundary():
    """The third boundary's line holds a key, put together here."""
    key = "'" + "gh" + "p_" + "aB3" * 12 + "'"
    rows = [{"doc_id": d, "line_number": 1, "latent": "a", "line": f"x = {key if d == 2 else d}", "gain": gain}
            for d, gain in ((0, 1.0), (0, 3.0), (1, 2.0), (1, -1.0), (2, 9.0))]  # fmt: skip
    assert [(row["doc_id"], row["gain"]) for row in best_latents(rows)] == [(0, 3.0), (1, 2.0)]


def test_latest_latents_are_of_this_run(tmp_path, make_trainer):
    """Those in memory, and in a process that resumes those on disk, but for later ones of another run."""
    trainer = make_trainer(TEXTS, log_latents_steps=1)
    trainer.train()
    rows = trainer.latent_log.latest(4)
    assert {row["step"] for row in rows} == {1} and len(rows) > 1  # of the second E-update, after one
    other = LatentLog(tmp_path / "run" / "_latents", trainer.processing_class, 1)
    assert other.latest(4) == rows
    assert {row["step"] for row in other.latest(1)} == {0} and other.latest(0) == []
    assert LatentLog(tmp_path / "nothing", trainer.processing_class, 1).latest(4) == []
    found = card_facts(trainer)
    assert found.latents[0]["gain"] == max(row["gain"] for row in rows)
    places = [(row["doc_id"], row["line_number"]) for row in rows]
    assert found.latents_of == len(set(places)) == len(places) / 3  # three latents at each


def test_the_table_of_latents_shows_equal_ones_once():
    """A phrase drawn eight times fills no table."""
    row = {"gain": 1.0, "think_prob": 0.5, "latent": " the same", "line": "x = 1\n"}
    rows = [*([row] * 8), row | {"latent": " another", "gain": -1.0}, row | {"line": "y = 2\n"}]
    assert latent_table(rows, "title").row_count == 3


# ---- how to use ----


def snippets(text: str, folder: Path) -> str:
    """The card's Python blocks, one behind the other, as they are run where `folder` is the Hub."""
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.S)).replace('"run"', repr(str(folder / "run")))


def test_the_snippets_of_a_plain_checkpoint_run(tmp_path, make_trainer, capsys):
    trainer = make_trainer(TEXTS, TEXTS[:1], dataset_license="PSF-2.0")
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(dataset_name="a test")
    card = valid(ModelCard.load(tmp_path / "run" / "README.md"))
    assert "Trained on a test (license: PSF-2.0)." in card.content and str(tmp_path) not in card.content
    assert "AutoModelForCausalLMWithAbstractionHead" in card.content and trainer.loop.learner is not None
    capsys.readouterr()
    exec(snippets(card.content, tmp_path), {})
    assert capsys.readouterr().out.count("def fibonacci(n):\n") == 3  # as it likes, without latents, by the head


@pytest.mark.parametrize("tagged", [False, True])
def test_the_snippets_of_an_adapter_run(tmp_path, make_trainer, tiny_model, tokenizers, capsys, tagged):
    """A local base: the reader puts its path in. Tags make the base's embeddings grow."""
    tokenizer = tokenizers["newline_indent"]
    tiny_model("llama", tokenizer).save_pretrained(tmp_path / "base")
    model = type(tiny_model("llama", tokenizer)).from_pretrained(tmp_path / "base")
    modules = {"modules_to_save": ["embed_tokens", "lm_head"]} if tagged else {}
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **modules)
    trainer = make_trainer(
        TEXTS, model=model, peft_config=adapter, action_format="python_tags" if tagged else "python"
    )
    trainer.save_model()
    trainer.create_model_card()
    card = valid(ModelCard.load(tmp_path / "run" / "README.md"))
    assert card.data.library_name == "peft" and "base_model" not in card.data.to_dict()
    assert ("skip_special_tokens=False" in card.content) == ("special token" in card.content) == tagged
    snippet = snippets(card.content, tmp_path)
    assert '"path/to/base"' in snippet and str(tmp_path) not in card.content
    capsys.readouterr()
    exec(snippet.replace('"path/to/base"', repr(str(tmp_path / "base"))), {})
    assert "def fibonacci(n):\n" in capsys.readouterr().out


def test_an_adapter_of_a_hub_model(tmp_path):
    card = valid(render_model_card(facts(adapter=True)))
    assert card.data["base_model_relation"] == "adapter" and card.data.library_name == "peft"
    assert 'AutoPeftModelForCausalLM.from_pretrained("org/mine")' in card.content
    for block in re.findall(r"```python\n(.*?)```", render_model_card(facts(abstraction_head=True)).content, re.S):
        compile(block, "card", "exec")
    assert 'action_format="slashes"' in render_model_card(facts(action_format="slashes")).content


# ---- the cards in the repository ----


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("*.json")), ids=lambda path: path.stem)
def test_cards_in_the_repository_are_rendered_from_their_facts(path):
    """After a change of the template: `python model_cards/render.py`."""
    card = valid(render_model_card(ModelCardFacts(**json.loads(path.read_text("utf-8")))))
    assert str(card) == path.with_suffix(".md").read_text("utf-8")


def test_there_are_cards_in_the_repository():
    assert list((ROOT / "model_cards").glob("*.json"))


# ---- the collection ----


class Recorded:
    """Stands in for `HfApi`: what it was asked to do."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*values, **settings):
            self.calls.append((name, values, settings))
            return SimpleNamespace(slug="org/mid-training-1")

        return call


def collection_module():
    spec = importlib.util.spec_from_file_location("push", ROOT / "model_cards" / "push.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_collections_layout_is_ready_to_push(tmp_path, monkeypatch):
    """Names that the Hub takes, commands that the parsers take; all is there before anything leaves, and no
    checkpoints or tokens with it."""
    module = collection_module()
    layout = module.read_layout()
    assert len(layout["title"]) < 60 and len(layout["description"]) <= 150  # the Hub's bounds
    for item in layout["items"]:
        validate_repo_id(f"org/{item['name']}")
        assert (
            item["type"] in ("model", "dataset") and (ROOT / "model_cards" / item.get("card", "README.md")).is_file()
        )
        command, *words = shlex.split(item["made_by"])[1:]
        if command in PARSERS:
            PARSERS[command]().parse_args(words)
        else:
            assert {word[2:] for word in words if word.startswith("--")} <= set(trainer_fields(command))
    models = [item["name"] for item in layout["items"] if item["type"] == "model"]
    api = Recorded()
    with pytest.raises(ValueError, match="has no README.md; make the checkpoint by `ra3 train"):
        module.push("org", tmp_path, api)
    for name in models:
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("A card.")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    (tmp_path / models[-1] / "config.json").write_text('{"token": "hf_abcdefghijklmnop"}')
    with pytest.raises(ValueError, match="would be uploaded"):
        module.push("org", tmp_path, api)
    assert api.calls == []
    (tmp_path / models[-1] / "config.json").write_text("{}")
    assert module.push("org", tmp_path, api) == "org/mid-training-1"
    uploads = [settings for name, _, settings in api.calls if name == "upload_folder"]
    assert [upload["repo_id"] for upload in uploads] == [f"org/{name}" for name in models]
    assert all({"checkpoint-*", ".env"} <= set(upload["ignore_patterns"]) for upload in uploads)
    assert all(settings["private"] for name, _, settings in api.calls if name.startswith("create"))
    assert [values[1] for name, values, _ in api.calls if name == "add_collection_item"] == [
        f"org/{item['name']}" for item in layout["items"]
    ]
