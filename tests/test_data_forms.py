"""Data as TRL's users bring it: conversations, tokens, formats, containers; trained tokens are `SFTTrainer`'s."""

from __future__ import annotations

import copy
from pathlib import Path

import pandas as pd
import pytest
import torch
import trl
from conftest import MARKS, furthest, weights
from datasets import Dataset, DatasetDict
from trl import SFTConfig, SFTTrainer

from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.hub import annotate_dataset
from ra3_trl.policy import Policy
from ra3_trl.records import Document, Latent
from ra3_trl.segmentation import PYTHON, RowForms, Segmenter, row_to_document, segment_dataset, splice
from ra3_trl.versions import CHECKPOINTING


TEMPLATES = Path(trl.__file__).parent / "chat_templates"
QWEN = (TEMPLATES / "qwen2_5.jinja").read_text("utf-8")  # TRL has a version for training
LLAMA = (TEMPLATES / "llama3_training.jinja").read_text("utf-8")  # marks the assistant's turns itself
PLAIN = (  # neither: turns are told by rendering
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CODE = [f"def f{i}(x):\n    y = x + {i}\n    if y > {i * 7}:\n        return y\n    return x\n" for i in range(8)]


def turns(i: int, more: bool = True) -> list[dict]:
    """Two questions and two answers that are code; or one each."""
    first = [{"role": "user", "content": f"Write f{i}."}, {"role": "assistant", "content": CODE[i]}]
    second = [
        {"role": "user", "content": "Shorter."},
        {"role": "assistant", "content": f"def f{i}(x):\n    return x\n"},
    ]
    return first + second if more else first


MESSAGES = [{"messages": turns(i, i % 2 == 0)} for i in range(8)]
HALVES = [{"prompt": turns(i)[:3], "completion": turns(i)[3:]} for i in range(8)]
TOOLS = [{"type": "function", "function": {"name": "run", "description": "d", "parameters": {"type": "object"}}}]


def given(rows: list[dict], tokenizer) -> list[dict]:
    """Rows as tokens; every third token is masked."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in rows]
    return [{"input_ids": row, "labels": [-100 if k % 3 == 0 else i for k, i in enumerate(row)]} for row in ids]


CASES = {
    "messages": (QWEN, MESSAGES, {"assistant_only_loss": True}, {}),
    "messages, marked template": (LLAMA, MESSAGES, {"assistant_only_loss": True}, {}),
    "all of messages": (PLAIN, MESSAGES, {}, {"assistant_only_loss": False}),
    "prompt and completion": (QWEN, HALVES, {}, {}),
    "its assistant only": (QWEN, HALVES, {"assistant_only_loss": True}, {"assistant_only_loss": True}),
    "all of prompt and completion": (LLAMA, HALVES, {"completion_only_loss": False}, {"completion_only_loss": False}),
    "from and value": (QWEN, [
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in turns(i)]} for i in range(8)
    ], {}, {"assistant_only_loss": False}),
    "tools": (QWEN, [row | {"tools": TOOLS} for row in MESSAGES], {"assistant_only_loss": True}, {}),
    "text halves": (QWEN, [{"prompt": code[:20], "completion": code[20:]} for code in CODE], {}, {}),
    "text halves, all": (QWEN, [{"prompt": code[:20], "completion": code[20:]} for code in CODE],
                         {"completion_only_loss": False}, {"completion_only_loss": False}),
    "halves that merge": (QWEN, [{"prompt": code[:10], "completion": code[10:]} for code in CODE], {}, {}),
    "tokens and labels": (QWEN, None, {}, {}),
}  # fmt: skip


LONG = [("messages", "llama"), ("messages", "qwen3_moe"), ("prompt and completion", "gemma2")]


@pytest.mark.parametrize(
    ("name", "architecture", "updates"),
    [*((*case, 20) for case in LONG), *((name, "llama", 2) for name in CASES if name != "messages")],
)
def test_what_is_trained_is_what_sft_trains_on(name, architecture, updates, chat, tiny_model, make_sft, make_ours):
    """The same tokens; losses and weights after 20 updates, of some forms after 2, at most 1e-5 apart in float32."""
    template, rows, of_sft, of_ours = CASES[name]
    tokenizer = chat(template)
    data = Dataset.from_list(given(CODE, tokenizer) if rows is None else rows)
    steps = {"max_steps": updates}
    sft = make_sft(tiny_model(architecture, tokenizer), copy.deepcopy(tokenizer), data, **of_sft | steps)
    ours = make_ours(tiny_model(architecture, tokenizer), copy.deepcopy(tokenizer), data, **of_ours | steps)
    wanted = [
        [(i, label != -100) for i, label in zip(r["input_ids"], r["labels"], strict=True)] for r in sft.train_dataset
    ]
    examples = [splice(row_to_document(row), {}) for row in ours.train_dataset]
    trained = [[(i, b != -100) for i, b in zip(e.input_ids, e.labels, strict=True)] for e in examples]
    assert [row[1:] for row in trained] == [row[1:] for row in wanted]  # nothing predicts the first
    before = weights(ours.model)
    sft.train(), ours.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (sft, ours)]
    assert len(losses[0]) == len(losses[1]) == updates
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5
    assert furthest(weights(sft.model), weights(ours.model)) < 1e-5 < 1e-3 < furthest(before, weights(ours.model))


_SHARED = {
    "max_length": 512, "learning_rate": 1e-3, "per_device_train_batch_size": 3, "max_steps": 20, "seed": 3,
    "lr_scheduler_type": "linear", "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True,
    "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture
def make_sft(tmp_path):
    def make(model, tokenizer, data, **settings) -> SFTTrainer:
        args = SFTConfig(str(tmp_path / "sft"), bf16=False, **{CHECKPOINTING: False}, **_SHARED | settings)
        return SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)

    return make


@pytest.fixture
def make_ours(tmp_path):
    def make(model, tokenizer, data, evaluation=None, formatting_func=None, **settings) -> RA3MidTrainer:
        defaults = {"e_steps": 0, "m_steps": -1, "log_latents_steps": 0, "num_latents": 2, "max_latent_length": 3}
        args = RA3Config(str(tmp_path / "ours"), **_SHARED | defaults | settings)
        return RA3MidTrainer(model, args, data, evaluation, tokenizer, formatting_func=formatting_func)

    return make


# ---- where latents stand ----


def documents(tokenizer, rows: list[dict], existing_comments: str = "keep", **forms) -> list[Document]:
    segmenter = Segmenter(tokenizer, PYTHON, 10_000, existing_comments)
    return [
        row_to_document(row) for row in segment_dataset(Dataset.from_list(rows), segmenter, forms=RowForms(**forms))
    ]


def texts_of(document: Document, tokenizer) -> list[str]:
    """The text of each line before which a latent may stand."""
    return [tokenizer.decode(document.lines_from(b, 1)) for b in document.boundaries]


@pytest.mark.parametrize("template", [QWEN, LLAMA, PLAIN], ids=["patched", "marked", "rendered"])
@pytest.mark.parametrize("form", ["messages", "halves"])
def test_latents_stand_in_the_assistants_turns_only(chat, template, form):
    """The user's code has none; nor has a line behind no newline, or the end of a turn."""
    tokenizer = chat(template)
    asked = "x = 1\ny = 2"
    messages = [
        {"role": "user", "content": asked}, {"role": "assistant", "content": "a = 1\nb = 2"},
        {"role": "user", "content": asked}, {"role": "assistant", "content": "c = 3\nd = 4"},
    ]  # fmt: skip
    row = {"messages": messages} if form == "messages" else {"prompt": messages[:3], "completion": messages[3:]}
    (document,) = documents(tokenizer, [row])
    lines = [text.split("<")[0].strip() for text in texts_of(document, tokenizer)]
    assert lines == (["a = 1", "b = 2", "c = 3", "d = 4"] if form == "messages" else ["c = 3", "d = 4"])
    for boundary in document.boundaries:  # an action ends where the turn does
        assert "<" not in tokenizer.decode(document.lines_from(boundary, 1))
    latent = Latent((tokenizer("z", add_special_tokens=False)["input_ids"][0],), True)
    spliced = splice(document, dict.fromkeys(document.boundaries, latent))
    text = tokenizer.decode(spliced.input_ids)
    assert text.count("#z\n") == len(lines) and "#z\nd = 4<" in text and f"{asked}<" in text
    assert "#z\nx" not in text and "#z\ny" not in text


def test_comments_of_the_assistant_can_be_stripped(chat):
    rows = [{"messages": [{"role": "user", "content": "# a\nx"}, {"role": "assistant", "content": "# b\ny = 1\n"}]}]
    tokenizer = chat(QWEN)
    (kept,), (stripped,) = documents(tokenizer, rows), documents(tokenizer, rows, "strip")
    assert "# b" in tokenizer.decode(kept.input_ids) and "# b" not in tokenizer.decode(stripped.input_ids)
    assert "# a" in tokenizer.decode(stripped.input_ids)


@pytest.mark.parametrize("kind", ["newline_alone", "newline_indent", "newline_punctuation", "sentencepiece"])
def test_tokens_are_the_text_they_are_of(chat, kind):
    """Documents of `input_ids` are those of the text: lines, boundaries, the EOS behind them; with a mask too."""
    tokenizer = chat(PLAIN, kind)
    code = "def f(x):\n    s = 'é☃'\n    return s\n"
    segmenter = Segmenter(tokenizer, PYTHON, 10_000)
    (wanted,) = segmenter(0, code)
    (document,) = documents(tokenizer, [{"input_ids": list(wanted.input_ids)}])
    assert document == wanted and document.boundaries
    labels = [-100] * 6 + list(wanted.input_ids[6:])
    (masked,) = documents(tokenizer, [{"input_ids": list(wanted.input_ids), "labels": labels}])
    assert masked.context == 6 and masked.input_ids == wanted.input_ids
    assert [masked.actions[b].boundary for b in masked.boundaries] == [
        wanted.actions[b].boundary for b in wanted.boundaries if wanted.actions[b].start >= 6
    ]


@pytest.mark.parametrize("template", [QWEN, LLAMA, PLAIN], ids=["patched", "marked", "rendered"])
@pytest.mark.parametrize("kind", ["newline_indent", "sentencepiece"])
def test_conversations_are_annotated(chat, tiny_model, tmp_path, template, kind):
    """The text of a row is the conversation as the template writes it, with latents in the assistant's turns; so of
    texts that hold special tokens, and of tokens."""
    tokenizer = chat(template, kind)
    texts = [f"{code}<|im_end|>\nz = 1\nz += 2\n{tokenizer.eos_token}" for code in CODE[:3]]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    settings = {"num_latents": 2, "max_latent_length": 3, "prior_alpha": 0.5, "max_length": 256, "use_cpu": True}
    args = RA3Config(str(tmp_path), seed=3, report_to="none", **settings)
    policy = Policy.of_model(tiny_model("llama", tokenizer), tokenizer, args, room_for_latents=True)
    for rows in (MESSAGES[:3], HALVES[:3], [{"text": text} for text in texts], [{"input_ids": row} for row in ids]):
        annotated = annotate_dataset(policy, Dataset.from_list(rows))
        latents = [latent for row in annotated for latent in row["latents"]]
        assert latents and all(row["num_boundaries"] for row in annotated)
        for i, row in enumerate(annotated):
            lines = row["annotated_text"].split("\n")
            for latent in reversed(row["latents"]):
                assert lines.pop(latent["line"] - 1).strip() == f"#{latent['text']}".strip()
            whole = rows[i].get("messages") or rows[i].get("prompt", []) + rows[i].get("completion", [])
            wanted = tokenizer.apply_chat_template(whole, tokenize=False) if whole else texts[i]
            text = "\n".join(lines)
            if "input_ids" in rows[i]:  # SentencePiece's tokens do not say that no space stood behind a special one
                text = text.replace("<|im_end|> ", "<|im_end|>")
            assert text.strip() == wanted.strip()


CONTENT = "{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}"


@pytest.mark.parametrize(
    ("row", "forms", "words"),
    [
        ({"messages": [*turns(0, False), {"role": "assistant", "content": None}]}, {}, "the chat template does not"),
        ({"text": "x"}, {"formatting_func": lambda row: row["no"]}, r"raised KeyError \('no'\); .*\['text'\]"),
        ({"text": "x"}, {"formatting_func": lambda row: row.text}, "raised AttributeError .*no attribute 'text'"),
        ({"text": "x"}, {"formatting_func": lambda: "x"}, "raised TypeError .*it is given one row"),
    ],
)
def test_programs_of_the_user_that_fail_name_the_row(chat, row, forms, words):
    """A template, of which `None` is no content; a function that formats."""
    with pytest.raises(ValueError, match=f"`train_dataset`, row 0: .*{words}"):
        documents(chat(CONTENT), [row], **forms)


# ---- containers ----


@pytest.mark.parametrize("stream", [False, True])
def test_formats_change_nothing(chat, tiny_model, make_ours, stream):
    tokenizer = chat(PLAIN)
    data = Dataset.from_dict({"text": CODE, "n": list(range(8))})
    data = data.to_iterable_dataset() if stream else data
    runs = []
    for kind in (None, "torch", "numpy", "pandas", "arrow"):
        rows = data.with_format(kind)
        ours = make_ours(tiny_model("llama", tokenizer), tokenizer, rows, rows, max_steps=2)
        ours.train()
        runs.append((weights(ours.model), ours.evaluate()["eval_ce"]))
        assert furthest(runs[0][0], runs[-1][0]) == 0 and runs[0][1] == runs[-1][1], kind


REFUSED = {
    "DatasetDict": (
        lambda: DatasetDict(train=TEXTS),
        r"`train_dataset` has the splits \['train'\]; .*data\['train'\]",
    ),
    "rows": (lambda: [{"text": "x = 1\n"}], r"`train_dataset` is a list; .*Dataset.from_list"),
    "texts": (lambda: ["x = 1\n"], r"`train_dataset` is a list; .*Dataset.from_dict"),
    "frame": (lambda: pd.DataFrame({"text": CODE}), r"`train_dataset` is a DataFrame; .*Dataset.from_pandas"),
    "torch": (lambda: Rows(), r"`train_dataset` is a Rows; .*Dataset.from_generator"),
    "transform": (lambda: TEXTS.with_transform(lambda batch: batch), r"`train_dataset` has a transform, .* by `map`"),
    "None": (lambda: column(text=[*CODE, None]), r"`train_dataset`, row 8: `text` is None; .*filter"),
    "no prompt": (lambda: column(prompt=[None], completion=["x"]), r"row 0: `prompt` is None; .*filter"),
    "bytes": (lambda: column(text=[b"x"]), r"row 0: `text` is b'x' \(bytes\)"),
    "halves of two kinds": (
        lambda: column(prompt=["x"], completion=[turns(0)]),
        "`completion` is a conv.*two of",
    ),
    "no turn": (
        lambda: column(messages=[turns(0), turns(0)[:1]]),
        "row 1: no token is the assistant's",
    ),
    "no messages": (lambda: column(messages=[[]]), r"row 0: `messages` is \[\] \(list\); give a list of messages"),
    "bad tools": (lambda: column(messages=[turns(0)], tools=["{"]), "row 0: `tools` is '{' .str., which is no JSON"),
    "unknown id": (lambda: column(input_ids=[[1], [99999]]), "row 1: `input_ids` has the id 99999"),
    "short labels": (lambda: column(input_ids=[[5, 6]], labels=[[5]]), "`labels` has 1 entries and `input_ids` 2"),
    "shifted labels": (lambda: column(input_ids=[[5, 6]], labels=[[6, -100]]), r"`labels\[0\]` is 6; .*not shifted"),
    "no column": (lambda: column(code=CODE), r"the columns \['code'\]; what can be read"),
}


def column(**columns) -> Dataset:
    return Dataset.from_dict(columns)


TEXTS = column(text=CODE)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> dict:
        return {"text": CODE[i]}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cant_be_read_is_refused_when_the_trainer_is_made(chat, tiny_model, make_ours, name):
    """Of evaluation data the same words, whichever door it comes by."""
    make, words = REFUSED[name]
    tokenizer = chat(QWEN)
    with pytest.raises(ValueError, match=words):
        make_ours(tiny_model("llama", tokenizer), tokenizer, make())
    if name == "DatasetDict":
        return
    with pytest.raises(ValueError, match=words.replace("train_dataset", "eval_dataset")):
        make_ours(tiny_model("llama", tokenizer), tokenizer, TEXTS, make())
    trainer = make_ours(tiny_model("llama", tokenizer), tokenizer, TEXTS)
    for door, called in ((trainer.evaluate, "eval"), (trainer.get_eval_dataloader, "eval"), (trainer.predict, "test")):
        with pytest.raises(ValueError, match=words.replace("train_dataset", f"{called}_dataset")):
            door(make())


def test_a_stream_names_its_row(chat, tiny_model, make_ours):
    rows = column(text=[*CODE[:5], None, *CODE[5:]]).to_iterable_dataset()
    with pytest.raises(ValueError, match="`train_dataset`, row 5: `text` is None"):
        make_ours(tiny_model("llama", chat(PLAIN)), chat(PLAIN), rows).train()


def test_every_door_takes_rows_as_the_trainer_does(chat, tiny_model, make_ours):
    tokenizer = chat(PLAIN)
    both = DatasetDict(a=column(text=CODE[:2]), b=column(text=CODE[2:4]))
    trainer = make_ours(tiny_model("llama", tokenizer), tokenizer, TEXTS, both)
    wanted = trainer.evaluate("a")["eval_ce"]
    assert trainer.evaluate(both["a"])["eval_ce"] == wanted
    assert trainer.evaluate(both)["eval_a_ce"] == wanted
    assert trainer.predict(both["a"]).metrics["test_ce"] == wanted
    assert trainer.predict(trainer.eval_dataset["a"]).metrics["test_ce"] == wanted  # cut already
    batches = [list(trainer.get_eval_dataloader(rows)) for rows in (both["a"], "a")]
    assert batches[0] == batches[1] and batches[0][0]["documents"][0].boundaries


# ---- settings ----


def test_settings_of_the_data(chat, tiny_model, make_ours, tmp_path):
    tokenizer = chat(PLAIN)
    model = tiny_model("llama", tokenizer)
    path = tmp_path / "qwen.jinja"
    path.write_text(QWEN, "utf-8")
    trainer = make_ours(model, tokenizer, TEXTS, eos_token="<|eot_id|>", pad_token="<|im_end|>", max_length=None,
                        chat_template_path=str(path), shuffle_dataset=True, dataset_kwargs={})  # fmt: skip
    assert tokenizer.chat_template == QWEN
    eot, end = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|im_end|>"])
    assert model.config.eos_token_id == eot and eot in model.generation_config.eos_token_id
    assert trainer.train_dataset[0]["input_ids"][-1] == eot and model.config.pad_token_id == end
    assert trainer.args.max_length == 2048 and not trainer.args.packing
    order = [tokenizer.decode(row["input_ids"][:-1]) for row in trainer.train_dataset]
    assert order == TEXTS.shuffle(seed=trainer.args.seed)["text"][:] != CODE


def test_a_template_of_another_tokenizer_brings_its_tokens(chat, tokenizers, tiny_model, make_ours, tmp_path):
    chat(PLAIN).save_pretrained(tmp_path / "other")
    tokenizer = copy.deepcopy(tokenizers["newline_indent"])
    data = Dataset.from_list(MESSAGES)
    trainer = make_ours(tiny_model("llama", tokenizer), tokenizer, data, chat_template_path=str(tmp_path / "other"))
    ids = tokenizer.convert_tokens_to_ids(list(MARKS))
    assert set(ids[:2]) <= set(trainer.train_dataset[0]["input_ids"]) and trainer.model.vocab_size >= len(tokenizer)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eos_token": "<no>"}, "`eos_token` is '<no>', which `processing_class`"),
        ({"pad_token": "<no>"}, "`pad_token` is '<no>', which `processing_class`"),
        ({"chat_template_path": "nowhere.jinja"}, "`chat_template_path` is 'nowhere.jinja', which is neither"),
        ({"assistant_only_loss": True}, "row 0: `assistant_only_loss` is True, and the columns .'text'. are no conv"),
        (
            {"dataset_kwargs": {"skip_prepare_dataset": True}},
            "row 0: `dataset_kwargs` has `skip_prepare_data",
        ),
        ({"dataset_kwargs": {"add_special_tokens": False}}, "`dataset_kwargs` has 'add_special_tokens'"),
        ({"completion_only_loss": True, "formatting_func": lambda row: row["text"]}, "`completion_only_loss` is True"),
    ],
)
def test_settings_that_cant_be_heeded(chat, tiny_model, make_ours, settings, words):
    tokenizer = chat(PLAIN)
    with pytest.raises(ValueError, match=words):
        make_ours(tiny_model("llama", tokenizer), tokenizer, TEXTS, **settings)
