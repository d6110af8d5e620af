"""vLLM itself: completions of `generate`, token for token. RLVR with it is in test_vllm_rlvr.py.

`make test-vllm` runs it, in an environment of its own: vLLM on a CPU, SmolLM2-135M, HumanEval's prompts.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import need_vllm
from test_vllm_hostile import latents


need_vllm()
TOKENS = int(os.environ.get("RA3_TEST_TOKENS", "64"))
PROMPTS = 20


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from ra3_trl.cli.smollm2 import smollm2
    from ra3_trl.evaluation import load_benchmark, render_prompt
    from ra3_trl.models import load_tokenizer

    tokenizer = load_tokenizer(str(smollm2()), {})
    tasks = load_benchmark("humaneval", max_tasks=PROMPTS).tasks
    return [tokenizer(render_prompt(task, task.kind, "complete")).input_ids for task in tasks]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, prompts) -> Path:
    """SmolLM2-135M with a head that has learned nothing of use: behind every second prompt it says yes."""
    from transformers import AutoModel

    from ra3_trl.cli.smollm2 import smollm2
    from ra3_trl.models import AbstractionConfig, AbstractionHead, save_head

    folder = tmp_path_factory.mktemp("vllm") / "smol"
    folder.mkdir()
    for path in smollm2().iterdir():
        (folder / path.name).symlink_to(path)
    torch.manual_seed(0)
    head = AbstractionHead(AbstractionConfig(576, trained_on=1))
    head.outer.weight.data.normal_(std=3.0)
    with torch.no_grad():
        body = AutoModel.from_pretrained(folder, dtype=torch.float32)
        states = torch.stack([body(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts])
        head.outer.bias[0] -= head(states)[0].median()
    save_head(head, folder)
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint):
    from ra3_trl.generation import VLLMEngine

    engine = VLLMEngine(str(checkpoint), dtype="float32", options={"max_model_len": 1024, "max_num_seqs": PROMPTS})
    yield engine
    vars(engine).pop("llm", None)


@pytest.fixture(scope="module")
def model(checkpoint):
    from ra3_trl.evaluation.evaluate import load_checkpoint

    return load_checkpoint(str(checkpoint), dtype="float32")


KNOBS = {
    "nothing": {},
    "stop": {"stop": ("\n\n", " return")},
    "always": {"think": "always"},
    "never": {"think": "never"},
    "gate": {"think": "auto"},
    "threshold": {"think": "auto", "threshold": 0.01},
}


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("knob", KNOBS)
def test_greedy_completions_are_those_of_generate(engine, model, prompts, knob, monkeypatch):
    """Of each of the 20 prompts all tokens, which of them were forced, the text, and whether it ended."""
    from ra3_trl.generation import CompletionSettings, draw_completions
    from ra3_trl.models import AbstractionConfig, AbstractionHead

    if knob == "threshold":  # without a gate: P(think) is that of the tokens
        for holder in (engine, model):
            monkeypatch.setattr(holder, "abstraction_head", AbstractionHead(AbstractionConfig(576)))
    settings = CompletionSettings(max_new_tokens=TOKENS, **KNOBS[knob])
    expected = [completion for (completion,) in draw_completions(model, prompts, settings)]
    drawn = [completion for (completion,) in engine.draw(prompts, settings)]
    same = [a.token_ids == b.token_ids for a, b in zip(drawn, expected, strict=True)]
    tokens, forced = sum(len(b.token_ids) for b in expected), sum(sum(b.forced) for b in expected)
    print(f"{knob}: {sum(same)} of {len(same)} prompts, {tokens} tokens, {forced} forced")
    assert drawn == expected
    assert any(any(completion.forced) for completion in expected) == (knob in ("always", "gate", "threshold"))


@pytest.mark.timeout(3000)
def test_samples_have_seeds(engine, prompts):
    from ra3_trl.generation import CompletionSettings

    settings = CompletionSettings(num_samples=3, temperature=0.8, max_new_tokens=8, think="always")
    first, again = (engine.draw(prompts[:2], settings, seed=7) for _ in range(2))
    other = engine.draw(prompts[:2], settings, seed=8)
    assert first == again != other
    assert all(len({completion.token_ids for completion in of_prompt}) > 1 for of_prompt in first)


HOT = {
    "always": {"think": "always"},
    "never": {"think": "never"},
    "threshold": {"think": "auto", "threshold": 0.0},
    "nothing": None,
}


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("knob", HOT)
def test_no_bias_makes_a_latent_hold_what_is_forbidden(engine, knob):
    """32 samples of 48 tokens at temperature 2, with `logit_bias` towards markers, what spells an order to Python,
    newlines and special tokens. Without the knob all of that is drawn; it can be with `never` too, but for markers."""
    from vllm import SamplingParams

    from ra3_trl.generation import CompletionSettings
    from ra3_trl.generation.requests import RequestThinking
    from ra3_trl.generation.vllm_engine import RowReader, request_words
    from ra3_trl.segmentation import PYTHON, token_bytes

    tokenizer, prompt = engine.tokenizer, engine.tokenizer("x = 1\n").input_ids
    data = token_bytes(tokenizer)
    ends = [i for i, b in enumerate(data) if b is None or b.strip(b" ") == b"\n"]
    pieces = [i for i, b in enumerate(data) if b in (b"coding", b"type", b":", b"=", b"#")]
    assert len(pieces) == 5 and len(ends) > 15
    thinking = HOT[knob] and RequestThinking(**HOT[knob], max_latent_length=12, eos_token_ids=engine.ends)
    words = request_words(CompletionSettings(), thinking, engine.ends)
    params = SamplingParams(
        **words, n=32, temperature=2.0, max_tokens=48, seed=0,
        logit_bias=dict.fromkeys(ends, 42.0) | dict.fromkeys(pieces, 48.0),
    )  # fmt: skip
    (output,) = engine.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    rows = [list(row.token_ids) for row in output.outputs]
    texts = [tokenizer.decode(row) for row in rows]
    orders = [any(order in text for order in PYTHON.forbidden_texts) for text in texts]
    begun = sum(text.lstrip(" ").startswith("#") for text in texts)
    if thinking is None:
        print(f"{knob}: {sum(orders)} of 32 samples hold an order, {begun} begin with a comment")
        assert sum(orders) > 5 and begun > 5
        return
    reader = RowReader(tokenizer, thinking, engine.ends, ())
    drawn = [latent for row in rows for latent in latents(data, row, list(reader(prompt, row).forced))]
    assert not any(data[i] is None for latent in drawn for i in latent)
    inside = [b"".join(data[i] for i in latent).decode("utf-8", "ignore") for latent in drawn]
    hold = sum(any(order in text for order in PYTHON.forbidden_texts) for text in inside)
    of_texts = f"{sum(orders)} of 32 samples hold an order, {begun} begin with a comment"
    print(f"{knob}: {of_texts}, {hold} of {len(inside)} latents")
    assert hold == 0
    assert (begun, len(inside)) == (0, 0) if knob == "never" else min(begun, len(inside)) > 10


@pytest.mark.timeout(3000)
def test_what_vllm_or_the_knob_cant_do_is_refused_and_the_engine_goes_on(engine, prompts):
    """Where the knob decides, no token might be left, or one that a grammar did not choose. vLLM's own refusals, of a
    temperature above 2, are `ValueError`s as elsewhere here."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    from ra3_trl.generation import CompletionSettings
    from ra3_trl.generation.requests import RequestThinking

    words = {"max_tokens": 4, "extra_args": RequestThinking("always").extra_args()}
    others = {"allowed_token_ids": [5], "structured_outputs": StructuredOutputsParams(regex="a+")}
    for name, value in others.items():
        with pytest.raises((ValueError, VLLMValidationError), match=f"`{name}` is .* `ra3_think`"):
            engine.llm.generate([{"prompt_token_ids": prompts[0]}], SamplingParams(**words, **{name: value}))
    with pytest.raises(ValueError, match="vLLM refuses the request: temperature must be in"):
        engine.draw(prompts[:1], CompletionSettings(temperature=5.0, max_new_tokens=4))
    assert engine.llm.generate([{"prompt_token_ids": prompts[0]}], SamplingParams(**words), use_tqdm=False)


@pytest.mark.timeout(3000)
def test_an_engine_that_dies_is_named(engine, prompts):
    """The last test: its processes are killed."""
    import psutil

    from ra3_trl.generation import CompletionSettings

    workers = [process for process in psutil.Process().children(recursive=True) if "VLLM::" in str(process.cmdline())]
    for process in workers:
        process.kill()
    assert workers
    with pytest.raises(OSError, match="vLLM's engine has stopped; .*the same command goes on"):
        engine.draw(prompts[:1], CompletionSettings(max_new_tokens=4))
