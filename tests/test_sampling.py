"""Batches of completions against one plain `generate` each, with the text cut by hand."""

from __future__ import annotations

import pytest
import torch
from conftest import TOKENIZERS
from transformers import GenerationConfig, set_seed

from ra3_trl import AutoModelForCausalLMWithAbstractionHead
from ra3_trl.generation import CompletionSettings, cut_at_stop, draw_completions
from ra3_trl.rollout import evaluating


PROMPTS = ("def f(x):\n", "import os\n\n\ndef area(radius, unit):\n    y = 1\n", "x")


@pytest.fixture
def wrapped(tokenizers, tiny_model):
    def make(name: str = "newline_indent", **settings):
        return AutoModelForCausalLMWithAbstractionHead(
            tiny_model("llama", tokenizers[name], **settings), tokenizer=tokenizers[name]
        )

    return make


def plain(model, prompt: str, tokens: int) -> list[int]:
    """The likeliest continuation, up to the end of the text: one forward of the whole text a token."""
    ids = model.tokenizer(prompt).input_ids
    start = len(ids)
    while len(ids) - start < tokens and (len(ids) == start or ids[-1] != model.tokenizer.eos_token_id):
        logits = model.pretrained_model(torch.tensor([ids])).logits
        ids = [*ids, int(logits[0, -1].argmax())]
    return ids[start:]


def drawn(model, *prompts: str, **settings):
    found = draw_completions(model, [model.tokenizer(p).input_ids for p in prompts], CompletionSettings(**settings))
    return [one for of_prompt in found for one in of_prompt]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_batch_is_what_each_prompt_gives_alone(wrapped, name):
    model = wrapped(name)
    for prompt, completion in zip(PROMPTS, drawn(model, *PROMPTS, max_new_tokens=24), strict=True):
        ids = plain(model, prompt, 24)
        assert list(completion.token_ids) == ids
        before = model.tokenizer.decode(model.tokenizer(prompt).input_ids, skip_special_tokens=True)
        whole = model.tokenizer.decode([*model.tokenizer(prompt).input_ids, *ids], skip_special_tokens=True)
        if whole.startswith(before):  # else a byte behind a newline's makes both invalid (SentencePiece)
            assert before + completion.text == whole
        assert completion.finished is (ids[-1] == model.tokenizer.eos_token_id)
        assert not any(completion.forced) and len(completion.forced) == len(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_stop_ends_a_completion_and_is_no_part_of_it(wrapped, name):
    """The stop is taken from the middle of what is written without; fewer tokens than those drawn do not hold it."""
    model = wrapped(name)
    whole = drawn(model, *PROMPTS, max_new_tokens=24)
    stops = tuple(one.text[7:9] for one in whole)
    cut = drawn(model, *PROMPTS, max_new_tokens=24, stop=stops)
    for prompt, one, full in zip(PROMPTS, cut, whole, strict=True):
        assert one.text == cut_at_stop(full.text, stops) != full.text
        assert one.finished and one.token_ids == full.token_ids[: len(one.token_ids)]
        written = drawn(model, prompt, max_new_tokens=len(one.token_ids))[0].text
        shorter = drawn(model, prompt, max_new_tokens=len(one.token_ids) - 1)[0].text if one.token_ids[1:] else ""
        assert any(stop in written for stop in stops) and not any(stop in shorter for stop in stops)


def test_what_the_prompt_begins_is_no_stop(wrapped):
    model = wrapped()
    text = drawn(model, "def f(x):\n", max_new_tokens=24)[0].text
    assert drawn(model, "def f(x):\n", max_new_tokens=24, stop=("\n" + text[:2],))[0].text == text
    assert drawn(model, "def f(x):\n", max_new_tokens=24, stop=(text[:2],))[0].text == ""


def test_the_checkpoints_generation_config_changes_nothing(wrapped):
    """But for the ids that end a text; and it is left as it was."""
    model = wrapped()
    expected = drawn(model, *PROMPTS, max_new_tokens=8)
    first = expected[0].token_ids[0]
    changed = GenerationConfig(
        suppress_tokens=[first], begin_suppress_tokens=[first], bad_words_ids=[[first]], guidance_scale=2.0,
        return_dict_in_generate=True, sequence_bias=[[[first], -9.0]], max_time=1e-9,
        eos_token_id=model.tokenizer.eos_token_id,
    )  # fmt: skip
    model.pretrained_model.generation_config = changed
    assert drawn(model, *PROMPTS, max_new_tokens=8) == expected
    assert model.pretrained_model.generation_config is changed


def test_the_end_of_the_text_is_drawn_and_padding_is_not(wrapped):
    """9 of 24 texts end within 12 tokens; where padding is the same token, one end is counted."""
    model = wrapped()
    end = model.tokenizer.eos_token_id
    model.pretrained_model.get_output_embeddings().weight.data[end] += 0.5
    for pad in (model.tokenizer.pad_token, model.tokenizer.eos_token):
        model.tokenizer.pad_token, was = pad, model.tokenizer.pad_token
        try:
            set_seed(0)
            found = drawn(model, *PROMPTS, num_samples=8, temperature=1.0, max_new_tokens=12)
        finally:
            model.tokenizer.pad_token = was
        ended = [one for one in found if one.finished]
        assert ended and all(one.token_ids.count(end) == 1 and one.token_ids[-1] == end for one in ended)
        cut = [one for one in found if not one.finished]
        assert cut and all(len(one.token_ids) == 12 and end not in one.token_ids for one in cut)


def test_samples_follow_the_models_probabilities(wrapped):
    """Of 2,000 first tokens the likeliest has a share within 4 standard errors of its probability."""
    model = wrapped()
    ids = model.tokenizer("def f(x):\n").input_ids
    chance = model.pretrained_model(torch.tensor([ids])).logits[0, -1].div(0.7).softmax(-1)
    set_seed(0)
    found = drawn(model, "def f(x):\n", num_samples=2000, temperature=0.7, max_new_tokens=1)
    share = sum(one.token_ids[0] == int(chance.argmax()) for one in found) / 2000
    p = float(chance.detach().max())
    assert abs(share - p) < 4 * (p * (1 - p) / 2000) ** 0.5
    assert len({one.token_ids for one in found}) > 10


def test_the_knobs_tokens_are_told_from_the_models(wrapped):
    """Where a latent is forced, `#` is the knob's and the latent's own tokens are the model's."""
    model = wrapped()
    (one,) = drawn(model, "def f(x):\n    y = 1\n", max_new_tokens=20, think="always")
    table = [model.tokenizer.decode([i]) for i in one.token_ids]
    knobs = [text for text, forced in zip(table, one.forced, strict=True) if forced]
    assert "".join(knobs).lstrip().startswith("#") and one.text.lstrip().startswith("#")
    assert 0 < sum(one.forced) < len(one.forced)
    assert not any(drawn(model, "def f(x):\n    y = 1\n", max_new_tokens=20, think="never")[0].forced)
    assert (
        not drawn(model, "def f(x):\n    y = 1\n", max_new_tokens=20, think="never")[0].text.lstrip().startswith("#")
    )


def test_the_checkpoints_generation_settings_do_not_count(wrapped):
    model = wrapped()
    before = drawn(model, *PROMPTS, max_new_tokens=16)
    config = model.pretrained_model.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.top_k, config.do_sample = 5.0, 1, 1, True
    assert drawn(model, *PROMPTS, max_new_tokens=16) == before
    set_seed(0)
    assert len({one.text for one in drawn(model, "x", num_samples=20, temperature=1.0, max_new_tokens=2)}) > 1


def test_a_model_in_training_stays_in_training(wrapped):
    model = wrapped(attention_dropout=0.5)
    before = drawn(model, *PROMPTS, max_new_tokens=16)
    model.pretrained_model.train()
    model.pretrained_model.gradient_checkpointing_enable()
    assert drawn(model, *PROMPTS, max_new_tokens=16) == before
    assert model.pretrained_model.training and model.pretrained_model.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_samples": 0}, "`num_samples` is 0; use at least 1"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"top_p": 0.0}, "`top_p` is 0.0"),
        ({"num_samples": 2}, "`num_samples` is 2 and `temperature` 0"),
        ({"stop": ("",)}, "`stop` holds an empty text"),
        ({"threshold": 0.5}, "`threshold` is 0.5 and `think` is None"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        CompletionSettings(**settings)


def test_an_empty_prompt_is_refused(wrapped):
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        draw_completions(wrapped(), [[]], CompletionSettings())


def test_the_model_stays_as_it_is_while_it_draws(wrapped):
    """Another thread may generate by the checkpoint's generation config, or draw for longer without dropout."""
    model = wrapped()
    config = model.pretrained_model.generation_config = GenerationConfig(max_new_tokens=3, suppress_tokens=[5])
    seen = []
    model.pretrained_model.model.register_forward_pre_hook(
        lambda *args: seen.append(model.pretrained_model.generation_config is config)
    )
    drawn(model, *PROMPTS, max_new_tokens=4)
    assert set(seen) == {True}

    model.pretrained_model.train()
    first, second = evaluating(model.pretrained_model), evaluating(model.pretrained_model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.pretrained_model.modules())  # the second is still inside
    second.__exit__(None, None, None)
    assert all(module.training for module in model.pretrained_model.modules())
