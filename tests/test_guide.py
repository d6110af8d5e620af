"""The Python blocks of docs/guide.md and docs/policy.md run, on a tiny model and few updates; and those of README with
every value that a comment offers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"## (.*?)\n|```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text("utf-8"), re.S)
CODE = "def f{i}(x):\n    y = x + {i}\n    if y > {j}:\n        return y\n    return x\n\n\n"


def named_blocks() -> list[tuple[str, str]]:
    """(heading, code) of every block."""
    found, heading = [], ""
    for title, code in BLOCKS:
        heading = title or heading
        if code:
            found.append((heading, code))
    return found


def with_offers(code: str) -> list[str]:
    """`code`, and for each value that a comment offers (`think="auto")  # or "always"`) the code with that value."""
    versions = [code]
    for line in code.splitlines():
        statement, _, comment = line.partition("  # or ")
        literals = re.findall(r'"[^"]*"', statement)
        # An offer such as "org/name" stands for what the reader has.
        offers = [offer for offer in re.findall(r'"[^"]*"', comment) if "/" not in offer]
        assert not offers or len(literals) == 1, f"which text may be {offers}? {line}"
        versions += [code.replace(line, statement.replace(literals[0], offer)) for offer in offers]
    return versions


def test_offers_are_seen():
    code = 'f("x")  # or "org/name"\nf(think="auto", n=1)  # or "always", "never"\n'
    assert with_offers(code)[1:] == [
        code.replace(code.splitlines()[1], f'f(think="{w}", n=1)') for w in ("always", "never")
    ]


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_what_comments_offer_runs(page, model_folder, tokenizers, tmp_path, monkeypatch):
    """The blocks that offer values, as README's with the wrapper, with each of them; what an earlier block of the page
    has made is made here."""
    import torch
    from transformers import AutoTokenizer

    from ra3_trl import AutoModelForCausalLMWithAbstractionHead

    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen-ra3").symlink_to(model_folder)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S)
    offering = [block for block in blocks if len(with_offers(block)) > 1]
    assert offering or page not in ("README.md", "docs/guide.md")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLMWithAbstractionHead.from_pretrained(model_folder)
    for block in offering:
        if page == "docs/guide.md":  # it trains first, which test_block_runs does
            block = "\n".join(line for line in block.splitlines() if "generate(" in line)
        for code in with_offers(block)[1:]:
            names = {"model": model, "inputs": tokenizer("def f(x):\n", return_tensors="pt"), "tokenizer": tokenizer}
            torch.manual_seed(0)
            exec(compile(code, page, "exec"), names)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizers, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("guide") / "model"
    tiny_model("llama", tokenizers["newline_indent"]).save_pretrained(folder)
    tokenizers["newline_indent"].save_pretrained(folder)
    return folder


def test_the_guide_has_blocks():
    assert len(named_blocks()) == 12


@pytest.mark.parametrize(("heading", "code"), named_blocks(), ids=[h.replace(" ", "_") for h, _ in named_blocks()])
def test_block_runs(heading, code, model_folder, tmp_path, monkeypatch, tokenizers):
    from ra3_trl import ACTION_FORMATS, config

    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    functions = [CODE.format(i=i, j=7 * i) for i in range(6)]
    (tmp_path / "FOLDER" / "code.py").write_text("".join(functions))
    for name in ("FILE.jsonl", "OTHER.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in functions))
    monkeypatch.setitem(ACTION_FORMATS, "plans", None)  # taken out again
    # What a tiny model on a CPU needs and a reader does not: short phases, no figures on the screen.
    monkeypatch.setattr(config.RA3Config, "__init__", small(config.RA3Config.__init__))
    code = re.sub(r"\be_steps=\d+", "e_steps=1", re.sub(r"\bm_steps=\d+", "m_steps=3", code))
    assert "MODEL" in code
    exec(compile(code.replace('"MODEL"', repr(str(model_folder))), heading, "exec"), {"__name__": "guide"})
    assert (tmp_path / "out").is_dir() or "evaluate" in code


def test_the_policy_page_runs_from_top_to_bottom(model_folder, tmp_path, monkeypatch, capsys):
    """As in a notebook, where it writes no more than it says."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "policy.md").read_text("utf-8"), re.S)
    assert len(blocks) == 8
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "policy"}
    for code in blocks:
        code = code.replace('open("MODEL", ', f"open({str(model_folder)!r}, use_cpu=True, max_length=256, ")
        exec(compile(code, "docs/policy.md", "exec"), names)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert "gain" in capsys.readouterr().out


def small(init):
    """`RA3Config.__init__` with other defaults."""

    def patched(self, **settings):
        defaults = {"use_cpu": True, "max_length": 256, "num_latents": 2, "max_latent_length": 4, "report_to": "none",
                    "log_latents_steps": 0, "disable_tqdm": True, "per_device_train_batch_size": 2}  # fmt: skip
        init(self, **defaults | settings)

    return patched
