"""The annotated corpus: how it is made and shared out, its card, and what keeps it from being pushed."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard
from huggingface_hub.utils import filter_repo_objects

import ra3_trl.hub.annotated
from ra3_trl.cli import annotate as command
from ra3_trl.cli.main import main as ra3
from ra3_trl.experimental.hindsight import HindsightConfig, HindsightTrainer
from ra3_trl.hub import (
    ANNOTATION,
    DatasetPush,
    annotate_dataset,
    find_secrets,
    join_chunks,
    render_dataset_card,
    scan_rows,
)
from ra3_trl.hub.dataset_card import preview_rows, size_category
from ra3_trl.hub.licenses import HUB_LICENSES
from ra3_trl.hub.publish import HfApi
from ra3_trl.segmentation import load_code_directory, splice, standard_library, token_bytes


CODE = "def f{i}(x):\n    y = x + {i}\n    if y > 2:\n        y = 'ß'\n    return y\n"
TEXTS = [CODE.replace("{i}", str(i)) for i in range(4)]
SETTINGS = {"prior_alpha": 0.5, "num_latents": 2, "max_length": 128}
LETTERS, DIGITS = "QwErTyUiOpAsDfGhJkLzXcVbNmqWeRtYuIoPaSdF" * 3, "3141592653589793238462643383279502884197"


def corpus(*licenses: str | None) -> Dataset:
    return Dataset.from_dict({"text": TEXTS[: len(licenses)], "license": list(licenses)})


def mixed(length: int) -> str:
    """Letters and digits in turn; put together here, so that no file holds what a scanner would stop at."""
    return "".join(a + b for a, b in zip(LETTERS, DIGITS, strict=False))[:length]


class NoHub:
    """In the place of `HfApi`: whoever asks for it has begun to upload."""

    def __init__(self, *args, **kwargs):
        pytest.fail("the Hub was asked")


class NotedHub:
    """In the place of `HfApi`, notes what it would do; tests/test_hub.py has a server."""

    calls: list = []

    def __init__(self, token=None):
        type(self).calls = [("token", token)]

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create_repo", repo_id, kwargs))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(self, repo_id, **kwargs):
        self.calls.append(("create_branch", repo_id, kwargs))

    def upload_folder(self, folder_path, **kwargs):
        files = sorted(p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file())
        data = load_dataset(str(folder_path), split="train", keep_in_memory=True)
        card = DatasetCard.load(Path(folder_path) / "README.md")
        self.calls.append(("upload_folder", files, data, card, kwargs))
        return SimpleNamespace(repo_url="https://hub/datasets/it")


# ---- secrets ----


def secrets() -> dict[str, str]:
    """One of each kind, in the text around it."""
    body = "\n".join([mixed(64)] * 3)
    return {
        "private key": f'KEY = """-----BEGIN RSA {"PRIVATE"} KEY-----\n{body}\n-----END',
        "AWS access key": f'id = "{"AK"}IA{"QWERTYUIOPASDFGH"}"',
        "AWS secret key": f'aws_secret_access_key = "{mixed(40)}"',
        "GitHub token": f"token = '{'gh'}p_{mixed(36)}'",
        "GitHub fine-grained token": f"{'github'}_pat_{mixed(22)}_{LETTERS[:59]}",
        "GitLab token": f"{'gl'}pat-{mixed(20)}",
        "Hugging Face token": f"login('{'h'}f_{LETTERS[:34]}')",
        "OpenAI key": f"{'s'}k-proj-{mixed(40)}T3Blbk{'FJ'}{mixed(40)}",
        "Anthropic key": f"{'s'}k-ant-api03-{LETTERS[:93]}",
        "Slack token": f"{'xo'}xb-{DIGITS[:12]}-{DIGITS[:12]}-{mixed(24)}",
        "Slack webhook": f"{'https'}://hooks.slack.com/services/{LETTERS[:9]}/{LETTERS[:10]}/{mixed(24)}",
        "Google API key": f"{'AI'}za{mixed(35)}",
        "Google OAuth secret": f"{'GOC'}SPX-{mixed(28)}",
        "Stripe key": f"{'s'}k_live_{mixed(24)}",
        "JSON web token": f"Bearer {'ey'}J{mixed(20)}.{'ey'}J{mixed(30)}.{mixed(40)}",
        "PyPI token": f"{'py'}pi-AgEIcHlwaS5vcmc{LETTERS[:60]}",
        "npm token": f"{'np'}m_{mixed(36)}",
        "SendGrid key": f"{'S'}G.{mixed(22)}.{mixed(43)}",
        "Telegram bot token": f"bot = '{DIGITS[:9]}:{'A'}A{mixed(33)}'",
        "OpenRouter key": f"{'s'}k-or-v1-{'0123456789abcdef' * 4}",
        "DigitalOcean token": f"{'do'}p_v1_{'0123456789abcdef' * 4}",
        "Azure storage key": f"Account{'Key'}={LETTERS[:86]}==",
        "password or key": f"config['db_pass{'word'}'] = '{mixed(16)}'",
        "password in an address": f"postgres{'://'}admin:{mixed(16)}@db.internal/x",
        "token or password": f"hf_{'token'}='{mixed(16)}'",
        "bearer token": f"Authorization: {'Bear'}er {mixed(24)}",
    }


# What stands by itself on a line, and other ways to write what `secrets` has.
MORE = [
    (
        "password in a settings file",
        f"DB_PASS{'WORD'}={mixed(12)}\nX=1\nexport API_{'KEY'}={LETTERS[:10]}3a\r\n",
        2,
    ),
    ("password in an address", f"redis{'://'}:{mixed(16)}@cache.internal:6379", 1),
    ("token or password", f'{{"pwd": "{mixed(16)}"}}', 1),
]


@pytest.mark.parametrize(("kind", "text"), secrets().items(), ids=secrets())
def test_secrets_are_found_and_not_shown(kind, text):
    found = find_secrets(f"import os\nx = 1  # {text}\n")
    assert [name for name, _, _ in found] == [kind]
    (secret,) = scan_rows([{"path": "a.py", "deep": [{"text": f'{text}"\n{text}'}]}])  # said twice, counted once
    assert (secret.row, secret.column, secret.kind) == (0, "deep", kind)
    assert found[0][2] not in str(secret) and f"{len(found[0][2])} characters" in str(secret)


@pytest.mark.parametrize(("kind", "text", "count"), MORE)
def test_more_secrets_are_found(kind, text, count):
    assert [name for name, _, _ in find_secrets(text)] == [kind] * count


def test_secrets_in_names_of_records():
    (secret,) = scan_rows([{"meta": {"users": {secrets()["npm token"]: 1}}}])
    assert (secret.column, secret.kind) == ("meta", "npm token")


@pytest.mark.parametrize(
    "text",
    [
        "password = getpass.getpass('Password: ')",
        "password = 'your-password-here-1234'",
        'api_key = os.environ["OPENAI_API_KEY"]',
        "token = 'abcdefghijklmnop'",  # no digit: a word
        "secret = 'aaaaaaaaaaaa1111'",  # hardly random
        'HEADER = b"-----BEGIN PRIVATE KEY-----"\nFOOTER = b"-----END PRIVATE KEY-----"',
        "http://user:password@example.com/",
        "AKIAIOSFODNN7EXAMPLE",  # of Amazon's documentation
        "hf_hub_download(repo_id, filename)",
        "eos_token = 'reserved_token_of_vocabulary_11'",
        f'publicKeyToken="{mixed(16)}"',
        "API_KEY=load_api_key_from_file_v2",
        "API_KEY=os.environ.get(3a)",
        "Bearer of_a_long_name_that_is_no_token",
        f"    key={mixed(16)},",
        f"REDIS_URL=redis{'://'}:password@localhost",
        "sk-learn",
        "hashlib.sha256(b'x').hexdigest() == '" + "0123456789abcdef" * 4 + "'",
    ],
)
def test_what_is_no_secret(text):
    assert find_secrets(text) == []


def test_no_secrets_in_the_standard_library():
    """A part of it here; all of its 674 files (11 MB) gave no hit when this was written, nor did its tests."""
    files = [
        path for name in ("email", "http", "urllib", "asyncio") for path in (standard_library() / name).glob("*.py")
    ]
    files += [standard_library() / name for name in ("hmac.py", "secrets.py", "ssl.py", "getpass.py", "imaplib.py")]
    assert len(files) > 60
    assert scan_rows({"text": path.read_text("utf-8")} for path in files) == []


# ---- licences ----


def test_rows_without_a_licence_are_refused():
    push = DatasetPush("org/name")
    assert push.check(corpus("MIT", "ISC"))["license"][:] == ["MIT", "ISC"]
    with pytest.raises(ValueError, match=r"2 rows have no licence \(column `license` names none\): 1, 2\. .*`allow_m"):
        push.check(corpus("MIT", "unknown", None))
    with pytest.raises(ValueError, match=r"10 rows .*: 0, 1, 2, 3, 4, 5, 6, 7, and 2 more"):
        push.check(Dataset.from_dict({"text": ["x"] * 10}))
    allowed = DatasetPush("org/name", allow_missing_licenses=True)
    assert allowed.check(corpus("MIT", None))["license"][:] == ["MIT", None]
    assert allowed.check(Dataset.from_dict({"text": ["x"]})).column_names == ["text"]


def test_columns_of_licences():
    rows = Dataset.from_dict({"text": ["a", "b"], "repo_licenses": [["MIT", "ISC"], ["MIT"]]})
    found = DatasetPush("org/name", license_column="repo_licenses").check(rows)
    assert found["license"][:] == ["MIT AND ISC", "MIT"] and found["repo_licenses"][0] == ["MIT", "ISC"]
    with pytest.raises(ValueError, match=r"`license_column` is 'licence', and the corpus has the columns"):
        DatasetPush("org/name", license_column="licence").check(rows)
    with pytest.raises(ValueError, match=r"has a column `license` besides"):
        DatasetPush("org/name", license_column="repo_licenses").check(rows.add_column("license", ["MIT", "MIT"]))
    of_all = DatasetPush("org/name", dataset_license="PSF-2.0")
    assert of_all.check(rows)["license"][:] == ["PSF-2.0"] * 2
    with pytest.raises(ValueError, match=r"2 rows have no licence"):
        DatasetPush("org/name", dataset_license="unknown").check(rows)
    with pytest.raises(ValueError, match="repo_id|Repo id"):
        DatasetPush("not a name")


def test_cells_that_name_no_licence_are_filled(tmp_path):
    (tmp_path / "a.py").write_text(f"# SPDX-License-Identifier: MIT\n{TEXTS[0]}")
    (tmp_path / "b.py").write_text(TEXTS[1])
    code = load_code_directory(str(tmp_path))
    assert sorted(code["license"]) == ["MIT", "unknown"]
    of_all = DatasetPush("org/name", dataset_license="ISC")
    filled = of_all.check(code)
    assert dict(zip(filled["path"], filled["license"], strict=True)) == {"a.py": "MIT", "b.py": "ISC"}
    assert set(filled.column_names) == set(code.column_names)
    lists = Dataset.from_dict({"text": ["a", "b", "c"], "license": [["MIT", "GPL-3.0"], [], None]})
    assert of_all.check(lists)["license"][:] == ["MIT AND GPL-3.0", "ISC", "ISC"]
    named = DatasetPush("org/name", license_column="terms", dataset_license="ISC")
    assert named.check(lists.rename_column("license", "terms"))["license"][:] == ["MIT AND GPL-3.0", "ISC", "ISC"]
    with pytest.raises(ValueError, match=r"set `dataset_license` to the licence of all rows that name none"):
        DatasetPush("org/name").check(code)


# ---- annotation ----


@pytest.mark.parametrize("max_tokens", [24, 40, 1000])
def test_joined_chunks_of_every_tokenizer(tokenizer, segmenter, max_tokens):
    """Without latents the chunks of a text join to the text, byte for byte, whatever the tokenizer and the cut."""
    texts = [TEXTS[0] * 4, "x = 1", "\ufeffif x:\r\n\ty = 'ß'\r\n", "  \n\nz = 2\n"]
    data = token_bytes(tokenizer)
    for text in texts:
        chunks = segmenter(tokenizer, max_tokens)(0, text)
        if chunks[0].status == "actions":
            assert join_chunks(text, [splice(chunk, {}) for chunk in chunks], data) == (text, [])


def test_processes_share_the_rows_out(make_trainer, monkeypatch):
    """Three processes, one of them with nothing to do in the second case, give the rows of one alone."""
    trainer = make_trainer(TEXTS, **SETTINGS)
    data = trainer.source_dataset
    alone = annotate_dataset(trainer.policy, data)
    args, parts = trainer.args, []
    monkeypatch.setattr(ra3_trl.hub.annotated, "gather_object", lambda found: parts.extend(found) or parts)
    for count in (3, 7):
        parts.clear()
        for rank in range(count):
            trainer.policy.args = SimpleNamespace(**vars(args) | {"process_index": rank, "world_size": count})
            try:
                together = annotate_dataset(trainer.policy, data)
            except KeyError:  # the rows of the ranks after this one are not there yet
                assert rank < count - 1
        assert together.to_list() == alone.to_list()


def test_annotated_rows(make_trainer):
    trainer = make_trainer(TEXTS, **SETTINGS)
    annotated = annotate_dataset(trainer.policy, trainer.source_dataset)
    assert set(annotated.column_names) == {"text", *ANNOTATION}
    latents = [latent for row in annotated for latent in row["latents"]]
    assert latents and all(isinstance(latent["gain"], float) for latent in latents)  # resampling measures them
    for row in annotated:
        assert ast.dump(ast.parse(row["annotated_text"])) == ast.dump(ast.parse(row["text"]))
    with pytest.raises(ValueError, match=r"columns \['annotated_text', .*already"):
        annotate_dataset(trainer.policy, annotated)
    with pytest.raises(ValueError, match=r"the corpus is empty"):
        annotate_dataset(trainer.policy, trainer.source_dataset.select([]))


def test_rows_of_another_format(make_trainer):
    """Rows that come as tensors are annotated as texts, and pushed as such."""
    trainer = make_trainer(TEXTS, **SETTINGS)
    plain = Dataset.from_dict({"text": TEXTS, "license": ["MIT"] * 4, "stars": [1, 2, 3, 4]})
    annotated = annotate_dataset(trainer.policy, DatasetPush("org/name").check(plain.with_format("torch")))
    assert annotated.to_list() == annotate_dataset(trainer.policy, plain).to_list()
    assert preview_rows(annotated, "python")


def test_a_formatting_func_makes_the_text(make_trainer, tiny_model, tokenizers):
    from ra3_trl import RA3MidTrainer

    usual = make_trainer(TEXTS, **SETTINGS)
    rows = Dataset.from_dict({"body": [text[3:] for text in TEXTS]})
    tokenizer = tokenizers["newline_indent"]
    trainer = RA3MidTrainer(
        tiny_model("llama", tokenizer),
        usual.args,
        rows,
        None,
        tokenizer,
        formatting_func=lambda row: "def" + row["body"],
    )
    annotated = annotate_dataset(trainer.policy, rows, trainer.cut.formatting_func)
    assert annotated["annotated_text"][:] == annotate_dataset(usual.policy, usual.source_dataset)["annotated_text"][:]


# ---- the card ----


def test_the_card_of_a_corpus(make_trainer, tmp_path):
    trainer = make_trainer(corpus("MIT", "PSF-2.0", "MIT"), **SETTINGS)
    annotated = annotate_dataset(trainer.policy, trainer.source_dataset)
    card = render_dataset_card(trainer.policy, annotated, "org/my-corpus", None, "org/source")
    block = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), re.S)[1])
    assert block["license"] == ["mit", "other"] and set(block["license"]) <= HUB_LICENSES
    assert block["size_categories"] == "n<1K" and block["task_categories"] == ["text-generation"]
    assert block["source_datasets"] == ["org/source"]
    assert "huggingface.co/papers/2509.25810" in card.content and "written by a language model" in card.content
    assert "| MIT | 2 |\n| PSF-2.0 | 1 |" in card.content
    count = sum(map(len, annotated["latents"]))
    assert f"3 documents, {count} latents at {sum(annotated['num_boundaries'])} boundaries." in card.content
    preview = preview_rows(annotated, "python")
    assert preview
    for shown in preview:
        first = annotated[shown["row"]]["latents"][0]
        lines = annotated[shown["row"]]["annotated_text"].split("\n")
        assert lines[first["line"] - 1].strip(" ") == shown["latent"] and lines[first["line"]].strip() == shown["next"]
        assert f"| {shown['row']} | <code>" in card.content and f"{shown['gain']:+.2f}" in card.content
    assert str(tmp_path) not in card.content
    assert "leaves out" not in card.content
    trainer.args.existing_comments = "strip"
    of_a_hub_model = render_dataset_card(
        trainer.policy, annotated, "org/my-corpus", "org/model", str(tmp_path)
    ).content
    assert "[org/model](https://huggingface.co/org/model)" in of_a_hub_model and str(tmp_path) not in of_a_hub_model
    assert "its own comments, which `annotated_text` leaves out." in of_a_hub_model


def test_a_card_without_latents_gains_or_licences(make_trainer):
    trainer = make_trainer(TEXTS, **SETTINGS)
    empty = {"annotated_text": "x", "latents": [], "num_boundaries": 0}
    one = {"annotated_text": "#a\nx|y\n", "latents": [{"line": 1, "text": "a", "gain": None}], "num_boundaries": 1}
    for rows in ([empty], [empty, one]):
        data = Dataset.from_list(rows, features=ANNOTATION)
        card = render_dataset_card(trainer.policy, data, "corpus")
        assert card.data.license == "unknown" and "| unknown | " in card.content
        assert ("| 1 | <code>#a</code> | <code>x&#124;y</code> |  |" in card.content) == (len(rows) == 2)
    twice = [{"annotated_text": "#a\nx\n#a\ny\n", "latents": [{"line": 3, "text": "a", "gain": None}],
              "num_boundaries": 1}]  # fmt: skip
    assert preview_rows(Dataset.from_list(twice, features=ANNOTATION), "python")[0]["next"] == "y"  # line 1 is its own
    inline = [{**one, "annotated_text": "<think>a</think>x = 1\n"}]
    assert preview_rows(Dataset.from_list(inline, features=ANNOTATION), "tags")[0]["next"] == "x = 1"
    assert [size_category(n) for n in (0, 999, 1000, 10**7, 10**8)] == [
        "n<1K", "n<1K", "1K<n<10K", "10M<n<100M", "100M<n<1B",
    ]  # fmt: skip


# ---- the push ----


def test_refusals_come_before_any_work(make_trainer, monkeypatch):
    """Nothing is annotated and the Hub is not asked; both refusals give way to their own name only."""
    trainer = make_trainer(corpus("MIT", None), **SETTINGS)
    monkeypatch.setattr("ra3_trl.hub.publish.HfApi", NoHub)
    monkeypatch.setattr("ra3_trl.hub.mixin.annotate_dataset", lambda *_: pytest.fail("annotated"))
    key = secrets()["GitHub token"]
    both = Dataset.from_dict({"text": [TEXTS[0], f"{TEXTS[1]}{key}\n"], "license": ["MIT", ""]})
    with pytest.raises(ValueError, match=r"1 rows have no licence"):
        trainer.push_annotated_dataset("org/name")  # the training data
    with pytest.raises(ValueError, match=r"1 rows have no licence"):
        trainer.push_annotated_dataset("org/name", both, allow_secrets=True)
    with pytest.raises(ValueError, match=r"1 rows .*\(1 × GitHub token\): row 1, `text`: GitHub token") as error:
        trainer.push_annotated_dataset("org/name", both, allow_missing_licenses=True)
    assert key[-30:-1] not in str(error.value) and "`allow_secrets`" in str(error.value)
    with pytest.raises(TypeError):
        trainer.push_annotated_dataset("org/name", both, True, True)
    with pytest.raises(ValueError, match=r"`dataset` is IterableDataset"):
        trainer.push_annotated_dataset("org/name", both.to_iterable_dataset())
    plain = make_trainer(corpus("MIT"), e_steps=0)
    with pytest.raises(ValueError, match=r"`e_steps` is 0"):
        plain.push_annotated_dataset("org/name")


def test_a_secret_that_the_model_writes_is_refused(make_trainer, monkeypatch):
    trainer = make_trainer(corpus("MIT"), **SETTINGS)
    monkeypatch.setattr("ra3_trl.hub.publish.HfApi", NoHub)
    row = {"annotated_text": "x", "latents": [{"line": 1, "text": secrets()["npm token"], "gain": None}],
           "num_boundaries": 1}  # fmt: skip
    monkeypatch.setattr("ra3_trl.hub.mixin.annotate_dataset", lambda *_: Dataset.from_list([row], features=ANNOTATION))
    with pytest.raises(ValueError, match=r"row 0, `latents`: npm token npm_… \(36 characters\)"):
        trainer.push_annotated_dataset("org/name")


def test_one_commit_holds_data_and_card(make_trainer, monkeypatch):
    trainer = make_trainer(corpus("MIT", "ISC"), hub_token="from the settings", hub_private_repo=True, **SETTINGS)
    monkeypatch.setattr("ra3_trl.hub.publish.HfApi", NotedHub)
    assert trainer.push_annotated_dataset("org/name", revision="v2").repo_url
    (_, token), create, branch, (_, files, data, card, kwargs) = NotedHub.calls
    assert token == "from the settings" and create[2]["private"] is True and branch[2]["branch"] == "v2"
    assert files == ["README.md", "data/train-00000-of-00001.parquet"]
    assert data.to_list() == annotate_dataset(trainer.policy, trainer.source_dataset).to_list()
    assert data.features["latents"] == annotate_dataset(trainer.policy, trainer.source_dataset).features["latents"]
    assert card.data.license == ["isc", "mit"] and kwargs["revision"] == "v2"
    assert 'load_dataset("org/name", split="train", revision="v2")' in card.content
    there = ["README.md", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "notes/data.csv"]
    gone = list(filter_repo_objects(there, allow_patterns=kwargs["delete_patterns"]))  # as the Hub's client does
    assert gone == there[1:3]  # of an earlier push: `load_dataset` would read them along
    trainer.push_annotated_dataset("name", private=False, token="mine")
    assert NotedHub.calls[0] == ("token", "mine") and NotedHub.calls[1][2]["private"] is False
    assert NotedHub.calls[-1][-1]["repo_id"] == "me/name"
    card = NotedHub.calls[-1][3]
    assert 'load_dataset("me/name", split="train")' in card.content and card.data.pretty_name == "name"


def test_the_command_pushes_the_same(make_trainer, tmp_path, monkeypatch, capsys):
    trainer = make_trainer(TEXTS, **SETTINGS)
    trainer.save_model()
    file = tmp_path / "rows.jsonl"
    corpus("MIT", "MIT").to_json(file)
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    argv = [str(tmp_path / "run"), "--dataset_name", str(file), *flags, "--push_to_hub", "org/name"]
    monkeypatch.setattr("ra3_trl.hub.publish.HfApi", NotedHub)
    assert command.main([*argv, "--private", "--output", str(tmp_path / "out")]) == 0
    assert "Pushed to https://hub/datasets/it." in capsys.readouterr().out
    assert NotedHub.calls[1][2]["private"] is True
    data = NotedHub.calls[-1][2]
    monkeypatch.setattr("ra3_trl.hub.publish.HfApi", HfApi)
    assert data.to_list() == load_dataset(str(tmp_path / "out"), split="train").to_list()
    monkeypatch.setattr("ra3_trl.hub.publish.HfApi", NoHub)
    Dataset.from_dict({"text": TEXTS}).to_json(file)
    with pytest.raises(ValueError, match=r"4 rows have no licence .*`dataset_license`"):
        command.main([*argv, "--output", str(tmp_path / "second")])
    assert not (tmp_path / "second").exists()


def test_the_command_names_the_corpus_as_others_load_it(make_trainer, tmp_path, monkeypatch):
    """Under its full name; folders of this machine are named by their last part."""
    make_trainer(TEXTS, **SETTINGS).save_model()
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "a.py").write_text(TEXTS[1])
    monkeypatch.chdir(tmp_path / "clients")
    monkeypatch.setattr("ra3_trl.hub.publish.HfApi", NotedHub)
    argv = ["../run", "--code_dir", "../clients", "--push_to_hub", "name", "--dataset_license", "ISC"]
    assert command.main(argv) == 0
    _, _, data, card, _ = NotedHub.calls[-1]
    assert 'load_dataset("me/name", split="train")' in card.content
    assert "Text of clients with" in card.content and "with run." in card.content and ".." not in card.content
    assert data["license"][:] == ["ISC"] and card.data.license == "isc" and "| ISC | 1 |" in card.content


# ---- the checkpoint's settings ----


def annotated_by_command(folder: Path, rows: Dataset, *flags: str) -> Dataset:
    rows.to_json(folder / "rows.jsonl")
    output = folder / f"out-{len(list(folder.glob('out-*')))}"
    argv = [str(folder / "run"), "--dataset_name", str(folder / "rows.jsonl"), "--output", str(output), *flags]
    assert command.main(argv) == 0
    return load_dataset(str(output), split="train")


def test_the_command_takes_the_settings_of_the_checkpoint(make_trainer, tmp_path):
    """As the trainer annotates; a flag is stronger. The licence of what it was trained on is not the corpus's."""
    rows = Dataset.from_dict({"text": ["int f(int x) {\n  int y = x;\n  y += 1;\n  return y;\n}\n"] * 3})
    own = {"action_format": "slashes", "max_latent_length": 7, "temperature": 0.7, "horizon": 1}
    trainer = make_trainer(rows, **SETTINGS | own, existing_comments="strip", dataset_license="MIT")
    trainer.save_model()
    by_trainer = annotate_dataset(trainer.policy, rows)
    assert sum(map(len, by_trainer["latents"])) and by_trainer[0]["annotated_text"].count("//")
    assert annotated_by_command(tmp_path, rows).to_list() == by_trainer.to_list()
    trainer.args.annotation = "policy"
    by_policy = annotate_dataset(trainer.policy, rows)
    found = annotated_by_command(tmp_path, rows, "--annotation", "policy")
    assert found.to_list() == by_policy.to_list() != by_trainer.to_list()
    with pytest.raises(ValueError, match=r"3 rows have no licence"):
        command.main([str(tmp_path / "run"), "--dataset_name", str(tmp_path / "rows.jsonl"), "--push_to_hub", "a/b"])


def test_the_policys_own_latents_after_training_in_hindsight(make_trainer, tmp_path):
    """`proposal`, its template and its price go together: with the policy's own latents none of them is left."""
    rows = Dataset.from_dict({"text": TEXTS})
    template = {"proposal": "template", "proposal_template": "{prefix}{think}{suffix}", "proposal_kl_coef": 0.2}
    usual = make_trainer(rows, **SETTINGS)
    args = HindsightConfig(
        output_dir=usual.args.output_dir, use_cpu=True, report_to="none", max_latent_length=4, **SETTINGS | template
    )
    HindsightTrainer(usual.model, args, rows, None, usual.processing_class).save_model()
    for flags in (("--proposal", "causal"), ("--annotation", "policy")):
        assert len(annotated_by_command(tmp_path, rows, *flags)) == len(TEXTS)
    with pytest.raises(ValueError, match="`proposal_kl_coef` is 0.5, but all latents are the policy's own"):
        annotated_by_command(tmp_path, rows, "--proposal", "causal", "--proposal_kl_coef", "0.5")


def test_the_head_of_the_checkpoint_decides(make_trainer, tmp_path):
    """One that always thinks, which the tokens' gate of a random model does not; then one that sees no chance."""
    rows = Dataset.from_dict({"text": TEXTS})
    trainer = make_trainer(rows, annotation="policy", gate="head", horizon=1, boundary_selection="head")
    head = trainer.loop.learner.head
    head.trained_on(1)
    head.outer.bias.data = torch.tensor([20.0, -9.0, 0.0])  # log-odds of thinking, gain, spread
    trainer.save_model()
    found = annotated_by_command(tmp_path, rows)
    assert [len(row["latents"]) for row in found] == found["num_boundaries"][:] and min(found["num_boundaries"]) > 1
    by_tokens = annotated_by_command(tmp_path, rows, "--gate", "token")
    assert sum(map(len, by_tokens["latents"])) < sum(by_tokens["num_boundaries"])
    # A prior of 0.3 and a gain of -9 nats are less than the 5 % of `annotation_skip`: nothing is tried, or measured.
    assert not any(annotated_by_command(tmp_path, rows, "--annotation", "resample", "--gate", "token")["latents"])
    tried = annotated_by_command(
        tmp_path, rows, "--annotation", "resample", "--gate", "token", "--annotation_skip", "0"
    )
    assert any(tried["latents"])
    with pytest.raises(ValueError, match=r"`gate` is 'head', but .*no trained abstraction head for 'slashes'"):
        annotated_by_command(tmp_path, rows, "--action_format", "slashes")


def test_a_corpus_without_boundaries_is_refused(make_trainer, tmp_path, monkeypatch, capsys):
    """C for a checkpoint of Python: nothing is written, nothing is pushed."""
    trainer = make_trainer(TEXTS, **SETTINGS)
    trainer.save_model()
    rows = Dataset.from_dict({"text": ["int f() {\n  return 1;\n}\n", ""], "license": ["MIT"] * 2})
    rows.to_json(tmp_path / "rows.jsonl")
    monkeypatch.setattr("ra3_trl.hub.publish.HfApi", NoHub)
    argv = ["annotate", str(tmp_path / "run"), "--dataset_name", str(tmp_path / "rows.jsonl")]
    assert ra3([*argv, "--output", str(tmp_path / "out"), "--push_to_hub", "org/name"]) == 2
    assert "none of the 2 texts has a boundary for `action_format` 'python'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"none of the 2 texts has a boundary"):
        trainer.push_annotated_dataset("org/name", rows)
