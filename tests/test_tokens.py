"""Facts about tokenizers: bytes of tokens, the UTF-8 automaton, the stop symbol, bans, fragments."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from slow_path import bytes_of, pending_bytes
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ra3_trl.segmentation import FragmentEncoder, build_token_table, token_bytes
from ra3_trl.segmentation.automaton import automaton_without
from ra3_trl.segmentation.tokens import encode_behind


# ---- UTF-8 ----


def assert_automaton_agrees(data: bytes) -> None:
    automaton, waits = automaton_without(()), pending_bytes(data)
    state = int(automaton.run([data])[0, 0])
    assert (state >= 0) == (waits is not None), data
    if waits is not None:
        assert automaton.pending[state] == waits, data


def test_pending_bytes_by_hand():
    """The judge itself: é is C3 A9, the euro sign E2 82 AC, surrogates (ED A0 80) and C0 80 are no UTF-8."""
    answers = {
        b"a": 0,
        b"\xc3": 1,
        b"\xc3\xa9": 0,
        b"\xe2": 2,
        b"\xe2\x82": 1,
        b"\xf0": 3,
        b"\xf0\x9f": 2,
        b"\xa9": None,
    }
    answers |= {b"\xed\xa0": None, b"\xc0": None, b"\xe0\x80": None, b"\xf4\x90": None, b"\xf5": None, b"\xe2a": None}
    assert {data: pending_bytes(data) for data in answers} == answers


def test_automaton_on_all_strings_of_one_and_two_bytes():
    for a in range(256):
        assert_automaton_agrees(bytes([a]))
    # All second bytes after each kind of first byte, the edges of every range included.
    for a in (
        0x00,
        0x7F,
        0x80,
        0xC1,
        0xC2,
        0xDF,
        0xE0,
        0xE1,
        0xEC,
        0xED,
        0xEE,
        0xEF,
        0xF0,
        0xF1,
        0xF3,
        0xF4,
        0xF5,
        0xFF,
    ):
        for b in range(256):
            assert_automaton_agrees(bytes([a, b]))


def test_automaton_on_random_strings():
    rng = random.Random(0)
    edges = [
        0x41,
        0x7F,
        0x80,
        0x8F,
        0x90,
        0x9F,
        0xA0,
        0xBF,
        0xC2,
        0xDF,
        0xE0,
        0xE1,
        0xEC,
        0xED,
        0xEE,
        0xEF,
        0xF0,
        0xF1,
        0xF4,
    ]
    valid = 0
    for _ in range(3000):
        data = bytes(rng.choices(edges, k=rng.choice([3, 3, 4, 5])))
        assert_automaton_agrees(data)
        valid += pending_bytes(data) is not None
    assert valid > 30


def test_automaton_goes_over_token_borders(tokenizer):
    """From the state one token leads to, the next one goes on as if both were one string."""
    table = build_token_table(tokenizer, len(tokenizer))
    rng, data = random.Random(1), table.token_bytes
    interesting = [i for i, b in enumerate(data) if b and not b.isascii()] + [
        i for i, b in enumerate(data) if b == b"a"
    ]
    for _ in range(1000):
        first, second = rng.choices(interesting, k=2)
        state = int(table.next_state_SV[0, first])
        assert (state >= 0) == (pending_bytes(data[first]) is not None)
        if state >= 0:
            after, waits = int(table.next_state_SV[state, second]), pending_bytes(data[first] + data[second])
            assert (after >= 0) == (waits is not None)
            assert after < 0 or int(table.pending_S[after]) == waits


# ---- bytes ----


def test_token_bytes_are_the_text(tokenizer):
    data = token_bytes(tokenizer)
    assert list(data) == bytes_of(tokenizer)
    text = "def f():\n\tré = '日本 🎉'\r\n    x\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(data[i] for i in ids).removeprefix(b" ") == text.encode()


# ---- the table ----


def test_stop_ids_are_all_newline_bearing_tokens_and_eos(tokenizer):
    table = build_token_table(tokenizer, len(tokenizer) + 5, eos_token_ids=(tokenizer.pad_token_id,))
    newline = {i for i, b in enumerate(bytes_of(tokenizer)) if b and b"\n" in b}
    assert set(table.stop_ids.tolist()) == newline | {tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(table.stop_ids) == len(newline) + 2
    assert table.stop_id in newline and table.eos_token_id == tokenizer.eos_token_id


def test_more_than_one_newline_token_is_there(tokenizers):
    """Else the test above shows little: 1 token where newlines stand alone, many where they are merged."""
    count = {name: len(build_token_table(t, len(t)).stop_ids) - 1 for name, t in tokenizers.items()}
    assert count["newline_alone"] == count["sentencepiece"] == 1
    assert count["newline_indent"] > 3 and count["newline_punctuation"] > 3


def test_carriage_return_nul_special_and_foreign_ids_are_banned(tokenizer):
    table = build_token_table(tokenizer, len(tokenizer) + 5)
    banned = [
        i for i, b in enumerate(bytes_of(tokenizer)) if b is None or any(c < 0x20 and c not in (0x09, 0x0A) for c in b)
    ]
    banned += range(len(tokenizer), len(tokenizer) + 5)
    banned = [i for i in banned if i not in table.stop_ids]
    assert len(banned) >= 1 + 30 + 5  # pad; the 32 controls less tab and newline; beyond the tokenizer
    assert (table.next_state_SV[:, banned] == -1).all()
    for b in (b"a", b" ", b"\t", b"#"):
        assert int(table.next_state_SV[0, table.token_bytes.index(b)]) == 0
        inside = table.pending_S > 0
        assert (table.next_state_SV[inside, table.token_bytes.index(b)] == -1).all()  # not inside a character


def test_markers_for_filling_in_the_middle_are_no_text(tokenizers):
    """Qwen2.5-Coder's are added tokens that are not special; what such a model writes behind a middle ends a latent.
    Gemma's tags are not special either, and are text."""
    tokenizer = copy.deepcopy(tokenizers["newline_alone"])
    markers = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|fim_pad|>"]
    tokenizer.add_tokens([AddedToken(text, special=False) for text in (*markers, "<table>")])
    ids = tokenizer.convert_tokens_to_ids([*markers, "<table>"])
    assert [token_bytes(tokenizer)[i] for i in ids] == [None] * 5 + [b"<table>"]
    table = build_token_table(tokenizer, len(tokenizer))
    assert (table.next_state_SV[:, ids[:3]] == -1).all() and table.next_state_SV[0, ids[5]] == 0
    assert set(ids[3:5]) <= set(table.stop_ids.tolist()) and not set(ids[:3]) & set(table.stop_ids.tolist())


def test_blank_tokens_are_those_of_white_space(tokenizer):
    table = build_token_table(tokenizer, len(tokenizer))
    for i, b in enumerate(bytes_of(tokenizer)):
        if b and i not in table.stop_ids and int(table.next_state_SV[0, i]) == 0:
            assert bool(table.blank_V[i]) == (b.decode().strip() == ""), b


def word_tokenizer(*words: str) -> Tokenizer:
    return Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))


def test_a_tokenizer_without_newline_token_is_refused():
    backend = word_tokenizer("[UNK]", "[END]", "a")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[END]")
    with pytest.raises(ValueError, match="no token that holds a newline"):
        build_token_table(tokenizer, 3)


def test_a_tokenizer_without_eos_is_refused(tokenizers):
    backend = tokenizers["newline_alone"].backend_tokenizer
    with pytest.raises(ValueError, match="no EOS token"):
        build_token_table(PreTrainedTokenizerFast(tokenizer_object=backend), 600)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="ByT5Tokenizer.*fast"):
        token_bytes(ByT5Tokenizer())


def test_tables_move_between_devices(tokenizers):
    table = build_token_table(tokenizers["newline_alone"], 600).to("meta")
    assert {t.device.type for t in (table.stop_ids, table.blank_V, table.next_state_SV, table.pending_S)} == {"meta"}


# ---- fragments ----


@pytest.mark.parametrize(
    "text", ["#", " #", "        #", "\t#", "\n", "\n   ", "\n       ", "\n\t", " why not", " é日", "\\", "):", '"""']
)
def test_fragments_have_exactly_their_bytes(tokenizer, text):
    ids = FragmentEncoder(tokenizer)(text)
    data = bytes_of(tokenizer)
    assert b"".join(data[i] for i in ids) == text.encode()


def test_fragments_are_as_in_the_middle_of_a_document(tokenizers):
    """`#` without SentencePiece's dummy space; the indent as behind a newline."""
    sentencepiece = tokenizers["sentencepiece"]
    assert sentencepiece.convert_ids_to_tokens(FragmentEncoder(sentencepiece)("#")) == ["#"]
    assert sentencepiece.convert_ids_to_tokens(FragmentEncoder(sentencepiece)("\n")) == ["<0x0A>"]
    merged = tokenizers["newline_indent"]
    assert merged.convert_ids_to_tokens(FragmentEncoder(merged)("\n   ")) == ["ĊĠĠĠ"]
    punctuation = tokenizers["newline_punctuation"]
    assert punctuation.convert_ids_to_tokens(FragmentEncoder(punctuation)("\n")) == ["Ċ"]
    assert encode_behind(merged, "\n", "   ") is None  # one token of both
    assert merged.convert_ids_to_tokens(encode_behind(merged, "a", "\n   ")) == ["ĊĠĠĠ"]


def test_a_fragment_without_exact_tokens_is_none():
    """A tokenizer that drops white space has no tokens for an indent."""
    backend = word_tokenizer("[UNK]", "[END]", "#", "\n", "a")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[\n#]"), "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[END]")
    fragment = FragmentEncoder(tokenizer)
    assert fragment("#") == (2,) and fragment("\n") == (3,)
    assert fragment("    #") is None
    assert torch.equal(build_token_table(tokenizer, 5).stop_ids, torch.tensor([3, 1]))
