"""What never leaves the machine with a push."""

from __future__ import annotations

import os

import pytest
import torch

from ra3_trl.hub import find_secrets, scan_rows
from ra3_trl.hub.secrets import check_card
from ra3_trl.outgoing import check_upload, process_tokens, token_in


LETTERS = "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"  # 34
HF = "hf_" + LETTERS


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    monkeypatch.setattr("ra3_trl.outgoing.get_token", lambda: None)
    for name in [name for name in os.environ if "TOKEN" in name or "KEY" in name]:
        monkeypatch.delenv(name)


def test_tokens_that_the_process_knows(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_API_KEY", "k3y-of-a-service")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # a setting
    monkeypatch.setenv("SSH_PRIVATE_KEY", "/home/me/.ssh/id_rsa")  # a place
    monkeypatch.setattr("ra3_trl.outgoing.get_token", lambda: "the-login-of-2026")
    tokens = process_tokens(hub_token=HF, model_init_kwargs={"token": "another-0ne"}, token=None)
    assert tokens == {
        "k3y-of-a-service": "the environment's MY_SERVICE_API_KEY", "the-login-of-2026": "the login of the Hub",
        HF: "`hub_token`", "another-0ne": "`model_init_kwargs`",
    }  # fmt: skip


@pytest.mark.parametrize(
    "content", ["x{}", "%3D{}%0A", "a\\n{}", '{{"k": "{}"}}'], ids=["behind_a_letter", "percent", "escape", "json"]
)
def test_a_token_is_looked_for_in_all_bytes(content):
    assert token_in(content.format(HF).encode(), {HF: "here"}) == "here"
    assert token_in(content.format(HF[:-1]).encode(), {HF: "here"}) is None


def test_a_token_with_signs_is_seen_encoded():
    token = 'p@ss/w"rd=9'
    for form in ("p%40ss%2Fw%22rd%3D9", 'p@ss/w\\"rd=9', token):
        assert token_in(form.encode(), {token: "here"}) == "here"


def test_files_that_would_leave(tmp_path):
    """Weights are looked through as everything else; what does not leave, and `.env` and its like, is not."""
    (tmp_path / "deep").mkdir()
    for name in (".env", "deep/token", "_latents", "deep/id_rsa", "empty"):
        (tmp_path / name).write_text("" if name == "empty" else HF)
    torch.save({"note": HF}, tmp_path / "optimizer.pt")
    patterns = check_upload(tmp_path, {HF: "here"}, ["_*", "optimizer.pt"])
    assert {"_*", "optimizer.pt", ".env", "*/token"} <= set(patterns)
    assert "tokenizer.json" not in patterns and "token*" not in patterns
    with pytest.raises(ValueError, match=r"optimizer\.pt holds here, and would be uploaded.*Nothing"):
        check_upload(tmp_path, {HF: "here"}, ["_*"])


@pytest.mark.parametrize(
    "text", [f"my{HF}", f'"\\n{HF}"', f"t%3D{HF}%26", f"hf%5F{LETTERS}", f"hf\\x5f{LETTERS}", f"hf\\u005f{LETTERS}_x"]
)
def test_the_scanner_sees_tokens_in_any_dress(text):
    assert [kind for kind, _, _ in find_secrets(text)] == ["Hugging Face token"]


def test_the_scanner_sees_forms_behind_escapes():
    key = "AKIA" + "Q3X7ZT5LMN2B4VCD"
    assert [kind for kind, _, _ in find_secrets(f"\\n{key}\\n")] == ["AWS access key"]
    assert find_secrets(f"SOMEAKIA{key[4:]}") == []  # in the middle of other letters it may be any


def test_columns_names_are_scanned():
    (secret,) = scan_rows([{HF: 1}, {HF: 2}])
    assert (secret.row, secret.column) == (0, "column 0") and HF not in str(secret)
    (secret,) = scan_rows([{"text": "call(quiet-word-7)"}], {"quiet-word-7": "the login of the Hub"})
    assert secret.kind == "the login of the Hub" and "quiet" not in str(secret)


def test_a_card_with_a_password_is_refused():
    check_card("# A model\ntrained on org/data\n", {})
    with pytest.raises(ValueError, match="password in an address") as error:
        check_card("- https://me:pa55w0rdofmine9@data.host/x.jsonl\n", {})
    assert "pa55" not in str(error.value)
