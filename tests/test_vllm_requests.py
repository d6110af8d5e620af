"""vLLM's interface of the think knob, without vLLM: batches in which requests come, go and change places.

What is written must be what `generate` writes, token for token. `make test-vllm` does the same with vLLM itself.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import threading
import weakref
from enum import Enum
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import requests
import torch
from conftest import TOKENIZERS, furthest
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AddedToken
from trl import GRPOConfig

from ra3_trl import ACTION_FORMATS, AutoModelForCausalLMWithAbstractionHead
from ra3_trl.evaluation import EvaluationSettings, draw
from ra3_trl.generation import CompletionSettings, VLLMEngine, draw_completions
from ra3_trl.generation.boundaries import LineReader
from ra3_trl.generation.requests import BatchThinking, RequestThinking
from ra3_trl.generation.vllm_engine import RowReader, request_words, require_vllm, thinking_engines
from ra3_trl.models import AbstractionConfig, AbstractionHead
from ra3_trl.rlvr import CompletionRollout, RLVRData, build_grpo_trainer
from ra3_trl.rlvr import trainer as rlvr_trainer
from ra3_trl.rlvr.vllm_rollout import watch_server


PROMPTS = ("def f(x):\n", "import os\n\n\ndef area(radius, unit):\n    y = 1\n", "x", "def f(x):\n    if x:\n")
Way = Enum("Way", ["UNIDIRECTIONAL", "SWAP"])
KNOBS = ({"think": "always"}, {"think": "never"}, {"think": "auto"}, {"think": "auto", "threshold": 1e-3})


@pytest.fixture
def wrapped(tokenizers, tiny_model):
    def make(name: str = "newline_indent", head: AbstractionHead | None = None):
        model = tiny_model("llama", tokenizers[name])
        return AutoModelForCausalLMWithAbstractionHead(model, head, tokenizer=tokenizers[name])

    return make


class Batch:
    """A batch as vLLM keeps it: places are filled from the left, and the last request moves into a place left free."""

    def __init__(self, model, room: int):
        self.model, self.room, self.rows, self.states = model, room, [], None
        self.processor = BatchThinking(
            lambda: model.tokenizer, lambda: model.abstraction_head, lambda: torch.stack(self.states)
        )

    def _forward(self, row: dict) -> torch.Tensor:
        out = self.model.pretrained_model(torch.tensor([row["prompt"] + row["written"]]), output_hidden_states=True)
        self.states.append(out.hidden_states[-1][0, -1])
        return out.logits[0, -1].float()

    @torch.no_grad()
    def run(self, requests: list[dict], tokens: int) -> list[list[int]]:
        waiting, step = list(requests), 0
        while waiting or self.rows:
            removed, moved, added = [], [], []
            for place in reversed(range(len(self.rows))):
                if self.rows[place]["done"]:
                    removed.append(place)
                    last = self.rows.pop()
                    if place < len(self.rows):
                        self.rows[place] = last
                        moved.append((len(self.rows), place, Way.UNIDIRECTIONAL))
            updates = [(removed, [], moved)]
            if step % 3 == 2 and len(self.rows) > 1:
                self.rows[0], self.rows[1] = self.rows[1], self.rows[0]
                updates.append(([], [], [(0, 1, Way.SWAP)]))
            if len(self.rows) < self.room and waiting:
                self.rows.append(row := waiting.pop(0))
                added.append((len(self.rows) - 1, row["params"], row["prompt"], row["written"]))
            updates.append(([], added, []))
            for one_removed, one_added, one_moved in updates:
                update = SimpleNamespace(removed=one_removed, added=one_added, moved=one_moved)
                self.processor.update_state(update if one_removed or one_added or one_moved else None)
            if not self.rows:
                break
            self.states = []
            logits = self.processor.apply(torch.stack([self._forward(row) for row in self.rows]))
            for row, token in zip(self.rows, logits.argmax(-1).tolist(), strict=True):
                row["written"].append(token)
                row["done"] = len(row["written"]) == tokens or token == self.model.tokenizer.eos_token_id
            step += 1
        return [request["written"] for request in requests]


def request(model, prompt: str, thinking: RequestThinking | None) -> dict:
    params = SimpleNamespace(extra_args=None if thinking is None else thinking.extra_args())
    BatchThinking.validate_params(params)
    return {"prompt": model.tokenizer(prompt).input_ids, "written": [], "params": params, "done": False}


def by_generate(model, prompt: str, **settings):
    ((completion,),) = draw_completions(model, [model.tokenizer(prompt).input_ids], CompletionSettings(**settings))
    return completion


@pytest.mark.parametrize("name", TOKENIZERS)
def test_requests_of_all_knobs_in_one_batch_are_written_as_by_generate(wrapped, name):
    """16 requests, each prompt under each knob, in 5 places; and what was forced is told from the tokens alone."""
    model = wrapped(name)
    eos, pairs = model.tokenizer.eos_token_id, [(prompt, knob) for prompt in PROMPTS for knob in KNOBS]
    thinking = [RequestThinking(**knob, max_latent_length=4, eos_token_ids=(eos,)) for _, knob in pairs]
    requests = [request(model, prompt, of) for (prompt, _), of in zip(pairs, thinking, strict=True)]
    model.abstraction_head.config = AbstractionConfig(model.config.hidden_size, max_latent_length=4)
    some_forced = 0
    for (prompt, knob), of, ids in zip(pairs, thinking, Batch(model, 5).run(requests, 24), strict=True):
        expected = by_generate(model, prompt, max_new_tokens=24, **knob)
        assert tuple(ids) == expected.token_ids, (prompt, knob)
        assert RowReader(model.tokenizer, of, (eos,), ())(model.tokenizer(prompt).input_ids, ids) == expected
        some_forced += sum(expected.forced)
    assert some_forced


def test_a_request_without_a_word_on_thinking_is_left_alone(wrapped):
    model = wrapped()
    silent, thinks = request(model, PROMPTS[0], None), request(model, PROMPTS[0], RequestThinking("always"))
    plain, with_latents = Batch(model, 2).run([silent, thinks], 12)
    assert tuple(plain) == by_generate(model, PROMPTS[0], max_new_tokens=12).token_ids != tuple(with_latents)


def test_the_heads_gate_decides_in_a_batch_as_in_generate(wrapped):
    """A head that says yes behind some lines and no behind others."""
    torch.manual_seed(0)
    model = wrapped()
    head = AbstractionHead(AbstractionConfig(model.config.hidden_size, max_latent_length=3, trained_on=1))
    head.outer.weight.data.normal_(std=3.0)
    head.outer.bias.data.zero_()
    model.abstraction_head = head
    eos = model.tokenizer.eos_token_id
    thinking = RequestThinking(max_latent_length=3, gated=True, eos_token_ids=(eos,))
    requests = [request(model, prompt, thinking) for prompt in PROMPTS * 2]
    decisions = set()
    for prompt, ids in zip(PROMPTS * 2, Batch(model, 3).run(requests, 24), strict=True):
        expected = by_generate(model, prompt, max_new_tokens=24, think="auto")
        assert tuple(ids) == expected.token_ids
        decisions.add(any(expected.forced))
        assert RowReader(model.tokenizer, thinking, (eos,), ())(model.tokenizer(prompt).input_ids, ids) == expected
    assert decisions == {True, False}


def test_a_preempted_request_goes_on_from_its_tokens(wrapped):
    """It comes back with what it has written, which is read, and a prompt is not (`prompt_is_code=False`)."""
    model = wrapped()
    thinking = RequestThinking("always", prompt_is_code=False, max_latent_length=3)
    prompt, (whole,) = PROMPTS[0], Batch(model, 1).run([request(model, PROMPTS[0], thinking)], 20)
    again = request(model, prompt, thinking)
    again["written"].extend(whole[:9])
    assert Batch(model, 1).run([again], 20) == [whole]


def added(model, place: int, prompt: str, thinking: RequestThinking | None) -> SimpleNamespace:
    """The update by which a request comes to a place."""
    row = request(model, prompt, thinking)
    return SimpleNamespace(removed=[], added=[(place, row["params"], row["prompt"], row["written"])], moved=[])


def test_a_request_that_ends_leaves_the_batch(wrapped):
    """The last of two, to whose place nobody moves: the next batch has one row."""
    model, always = wrapped(), RequestThinking("always")
    processor, free = BatchThinking(lambda: model.tokenizer), torch.zeros(2, model.config.vocab_size)
    for place in (0, 1):
        processor.update_state(added(model, place, PROMPTS[0], always))
    assert not torch.equal(processor.apply(free.clone())[1], free[1])
    processor.update_state(SimpleNamespace(removed=[1], added=[], moved=[]))
    assert not torch.equal(processor.apply(free[:1].clone()), free[:1])
    processor.update_state(SimpleNamespace(removed=[0], added=[], moved=[]))
    assert torch.equal(processor.apply(free.clone()), free)


def test_a_request_that_comes_to_the_place_of_another_is_its_own(wrapped):
    """vLLM lists a request as removed only where no other takes its place: this one says nothing of thinking."""
    model = wrapped()
    processor, free = BatchThinking(lambda: model.tokenizer), torch.zeros(1, model.config.vocab_size)
    processor.update_state(added(model, 0, PROMPTS[0], RequestThinking("always")))
    processor.update_state(added(model, 0, PROMPTS[0], None))
    assert torch.equal(processor.apply(free.clone()), free)


def test_what_may_stand_at_a_boundary(wrapped):
    """The think prefix's first token, or one of the ends that the request names; vLLM must ask for greedy requests
    too, since the likeliest token may be none of these."""
    model = wrapped()
    processor, eos = BatchThinking(lambda: model.tokenizer), model.tokenizer.eos_token_id
    processor.update_state(added(model, 0, PROMPTS[0], RequestThinking("always", eos_token_ids=(eos, 77))))
    logits = torch.zeros(1, model.config.vocab_size)
    logits[0, 99] = 5.0
    shaped = processor.apply(logits)[0]
    left = shaped.isfinite().nonzero()[:, 0].tolist()
    (first,) = set(left) - {eos, 77}
    assert len(left) == 3 and model.tokenizer.decode([first]).isspace() and shaped.argmax() != 99
    assert not processor.is_argmax_invariant()


def test_a_decision_on_a_part_of_the_prompt_is_taken_back(wrapped):
    """vLLM runs long prompts in parts and shapes what each ends in. The gate said no to a part, whose state was
    another, and says yes to the whole, which ends in the spaces that a think prefix begins with."""
    model = wrapped("newline_alone")
    head = AbstractionHead(AbstractionConfig(model.config.hidden_size, trained_on=1))
    state, left = torch.zeros(1, model.config.hidden_size), []
    processor = BatchThinking(lambda: model.tokenizer, lambda: head, lambda: state)
    processor.update_state(added(model, 0, "def f(x):\n   ", RequestThinking(gated=True)))
    head.outer.weight.data.zero_()
    for logit in (-9.0, 9.0):
        head.outer.bias.data.fill_(logit)
        left.append(int(processor.apply(torch.zeros(1, model.config.vocab_size)).isfinite().sum()))
    assert left[0] > 1 == left[1]  # the token that goes on with the prefix


def test_rows_that_were_not_steered_are_noticed(wrapped):
    model = wrapped()
    ids = model.tokenizer(PROMPTS[0]).input_ids
    free = list(by_generate(model, PROMPTS[0], max_new_tokens=8).token_ids)
    always = RequestThinking("always", eos_token_ids=(model.tokenizer.eos_token_id,))
    with pytest.raises(ValueError, match="`think` is 'always', and vLLM wrote what that bans.*--logits-processors"):
        RowReader(model.tokenizer, always, (), ())(ids, free)
    comment = model.tokenizer("    # x\n", add_special_tokens=False).input_ids
    with pytest.raises(ValueError, match="`think` is 'never', and vLLM wrote"):
        RowReader(model.tokenizer, RequestThinking("never"), (), ())(ids, comment)


@pytest.mark.parametrize("knob", [{"think": "never"}, {"think": "auto", "threshold": 0.5}, {"think": "auto"}])
def test_a_tag_past_every_decision_is_noticed(tokenizers, knob):
    """In the middle of a line, where nothing decides; without a threshold the model opens latents as it likes."""
    tokenizer = copy.deepcopy(tokenizers["newline_indent"])
    tags = [AddedToken(tag, special=True, normalized=False) for tag in ACTION_FORMATS["python_tags"].tags]
    tokenizer.add_tokens(tags, special_tokens=True)
    row = [*tokenizer("x = 1\ny").input_ids, tokenizer.convert_tokens_to_ids(tags[0].content)]
    thinking = RequestThinking(**knob, action_format="python_tags")
    forced = thinking.steering(tokenizer).forced(LineReader(thinking.steering(tokenizer).vocabulary, True), (), row)
    assert (forced is None) == (knob != {"think": "auto"})


@pytest.mark.parametrize("knob", KNOBS)
def test_ids_that_the_tokenizer_has_not_may_be_drawn(wrapped, knob):
    """Models often have more rows than their tokenizer has ids; at the end of a line, where latents begin, too."""
    model, ends = wrapped(), ()
    tokenizer = model.tokenizer
    reader, unknown = RowReader(tokenizer, RequestThinking(**knob), ends, ()), [len(tokenizer) + 3] * 2
    if knob["think"] == "always":
        with pytest.raises(ValueError, match="vLLM wrote what that bans"):
            reader(tokenizer(PROMPTS[0]).input_ids, unknown)
    else:
        completion = reader(tokenizer(PROMPTS[0]).input_ids, unknown)
        assert (completion.text, completion.forced) == ("", (False, False))


# ---- what a request says ----


def test_a_request_says_all_of_it_in_texts_and_numbers():
    thinking = RequestThinking("auto", 0.25, "python", 7, False, False, (2, 5))
    words = thinking.extra_args()
    assert words["ra3_threshold"] == 0.25 and words["ra3_eos_token_ids"] == [2, 5]
    assert all(isinstance(value, str | int | float | list) and value is not True for value in words.values())
    assert RequestThinking.of(words | {"other": 1}) == thinking
    assert RequestThinking.of({"other": 1}) is RequestThinking.of(None) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"ra3_think": "often"}, "`think` is 'often'"),
        ({"ra3_think": "always", "ra3_threshold": 0.5}, "`threshold` is 0.5 and `think` is 'always'"),
        ({"ra3_threshold": 2}, "`threshold` is 2.0"),
        ({"ra3_thinks": "auto"}, "`ra3_thinks` is nothing that a request can say; use some of ra3_think,"),
        ({"ra3_think": "auto", "ra3_action_format": "cobol"}, "cobol"),
        ({"ra3_think": ["always"]}, r"`ra3_think` is \['always'\]; use a text"),
        ({"ra3_action_format": ["python"]}, r"`ra3_action_format` is \['python'\]; use a text"),
        ({"ra3_threshold": "high"}, "`ra3_threshold` is 'high'; use a number"),
        ({"ra3_threshold": float("nan")}, "`threshold` is nan"),
        ({"ra3_threshold": 10**400}, "`ra3_threshold` is 1000.*; use a number from 0 to 1"),
        ({"ra3_action_format": "prose"}, "`action_format` is 'prose', whose latents do not begin behind a newline"),
        ({"ra3_max_latent_length": float("inf")}, "`ra3_max_latent_length` is inf; use a whole number"),
        (
            {"ra3_max_latent_length": 2**63},
            "`ra3_max_latent_length` is .*; use a whole number of at most 2,147,483,647",
        ),
        ({"ra3_max_latent_length": 2.5}, "`ra3_max_latent_length` is 2.5; use a whole number"),
        ({"ra3_max_latent_length": 0}, "`max_latent_length` is 0"),
        ({"ra3_prompt_is_code": "no"}, "`ra3_prompt_is_code` is 'no'; use 0 or 1"),
        ({"ra3_gated": 2}, "`ra3_gated` is 2; use 0 or 1"),
        ({"ra3_eos_token_ids": 5}, "`ra3_eos_token_ids` is 5; use a list of token ids"),
        ({"ra3_eos_token_ids": [2, -1]}, "`ra3_eos_token_ids` is .*; use a list of token ids"),
        ({"ra3_eos_token_ids": ["2"]}, "`ra3_eos_token_ids` is .*; use a list of token ids"),
        ({"ra3_eos_token_ids": [2**63]}, "`ra3_eos_token_ids` is .*; use a list of token ids"),
    ],
)
def test_what_a_request_cant_say_is_refused_before_it_runs(words, message):
    with pytest.raises(ValueError, match=message):
        BatchThinking.validate_params(SimpleNamespace(extra_args=words))


def test_what_was_made_for_thresholds_of_before_is_let_go(wrapped):
    """Each has masks as wide as the vocabulary; of 40 the first is gone, and a request that runs keeps its own."""
    model = wrapped()
    processor, made = BatchThinking(lambda: model.tokenizer), []
    for n in range(40):
        params = request(model, PROMPTS[0], RequestThinking(threshold=n / 100))["params"]
        processor.update_state(SimpleNamespace(removed=[0], added=[(0, params, [], [])], moved=[]))
        made.append(weakref.ref(processor._requests[0].steering))
    gc.collect()
    assert made[0]() is None and made[-1]() is processor._requests[0].steering


def test_stops_and_thinking_go_to_an_engine_and_to_a_server():
    settings, thinking = CompletionSettings(stop=("\ndef",)), RequestThinking("never")
    assert request_words(settings, None, (2,)) == {"stop": ["\ndef"], "stop_token_ids": [2], "ignore_eos": True}
    assert request_words(settings, thinking, (2,))["extra_args"]["ra3_think"] == "never"
    assert request_words(settings, thinking, (2,), server=True)["vllm_xargs"]["ra3_think"] == "never"


# ---- vLLM that is missing, too old, or made by TRL ----


def pretend(monkeypatch, version: str, cpu: bool = False) -> ModuleType:
    vllm = ModuleType("vllm")
    vllm.__version__, vllm.LLM = version, type("LLM", (), {"__init__": lambda self, **words: vars(self).update(words)})
    vllm.platforms, vllm.utils = ModuleType("vllm.platforms"), ModuleType("vllm.model_executor.layers.utils")
    vllm.platforms.current_platform = SimpleNamespace(is_cpu=lambda: cpu)
    vllm.utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(layer, "packed", remove_weight)
    for module in (vllm, vllm.platforms, vllm.utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    return vllm


def test_a_vllm_that_is_missing_or_too_old_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="`backend` is 'vllm', and vLLM can't be imported .*pip install 'vllm>=0.22'"):
        VLLMEngine(str(tmp_path))
    for version in ("0.9.2", "0.21.1rc1"):
        pretend(monkeypatch, version)
        with pytest.raises(ValueError, match=f"vLLM {version} is installed, which is too old; .*vllm>=0.22"):
            require_vllm("`use_vllm` is True")
    monkeypatch.delattr(pretend(monkeypatch, "0.31.0"), "LLM")  # whose libraries do not load
    with pytest.raises(ValueError, match="vLLM can't be imported .*LLM.*; `pip install 'vllm>=0.22'"):
        require_vllm("`use_vllm` is True")
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))  # a folder of that name
    with pytest.raises(ValueError, match="vLLM can't be imported .*__version__.*; `pip install 'vllm>=0.22'"):
        require_vllm("`use_vllm` is True")
    for version in ("0.22.0", "1.0.0", "dev"):
        vllm = pretend(monkeypatch, version)
        assert require_vllm("`use_vllm` is True") is vllm


def test_engines_that_trl_makes_have_the_processor_and_no_head_among_the_weights(wrapped, monkeypatch, tmp_path):
    """vLLM loads every `.safetensors` of a folder, unless an index names those of the model."""
    vllm, model = pretend(monkeypatch, "0.31.0"), wrapped()
    model.pretrained_model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "with_head")
    plain = vllm.LLM.__init__
    with thinking_engines():
        made, other = (vllm.LLM(model=str(tmp_path / name), seed=3) for name in ("plain", "with_head"))
    assert vllm.LLM.__init__ is plain
    assert made.logits_processors == ["ra3_trl.generation.vllm_processor:ThinkRequestProcessor"] and made.seed == 3
    assert made.model == str(tmp_path / "plain")
    names = {path.name for path in Path(other.model).iterdir()}
    assert names == {path.name for path in (tmp_path / "with_head").iterdir()} | {"model.safetensors.index.json"}
    weights = load_file(tmp_path / "with_head" / "model.safetensors")
    index = json.loads(Path(other.model, "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(weights, "model.safetensors")
    loaded = AutoModelForCausalLMWithAbstractionHead.from_pretrained(other.model)  # by transformers as before
    assert furthest(dict(loaded.state_dict()), dict(model.state_dict())) == 0


@pytest.mark.parametrize("cpu", [True, False])
def test_an_engine_that_trl_makes_on_a_cpu_keeps_weights_that_can_be_loaded_again(monkeypatch, cpu):
    """A matrix stays as it is and is multiplied with by torch; what is none (of a convolution) is vLLM's matter."""
    vllm = pretend(monkeypatch, "0.32.0", cpu)
    pack = vllm.utils.dispatch_cpu_unquantized_gemm
    linear, other = torch.nn.Linear(3, 2), torch.nn.Conv1d(3, 2, 4)
    with thinking_engines():
        for layer in (linear, other):
            vllm.utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert vllm.utils.dispatch_cpu_unquantized_gemm is pack
    assert other.packed is True and hasattr(linear, "packed") is not cpu
    if cpu:
        linear.weight.data.fill_(2.0)  # as a weight sync does, in place
        assert linear.cpu_linear(torch.ones(3), linear.weight, None).tolist() == [6.0, 6.0]


# ---- our own engine ----


class _Refuses(Exception):
    """vLLM's `VLLMValidationError`."""


@pytest.fixture
def engine(wrapped, monkeypatch, tmp_path):
    """`engine(model)`: a `VLLMEngine` of a checkpoint, whose vLLM decodes greedily by [`Batch`] and heeds no stop."""
    vllm = pretend(monkeypatch, "0.31.0")
    vllm.SamplingParams = lambda **words: SimpleNamespace(**{"extra_args": None} | words)
    for name, error in (("v1.engine.exceptions", "EngineDeadError"), ("exceptions", "VLLMValidationError")):
        module = ModuleType(f"vllm.{name}")
        vars(module)[error] = _Refuses if name == "exceptions" else type(error, (Exception,), {})
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def make(model, generate=None, **options):
        model.save_pretrained(tmp_path / "model")
        model.tokenizer.save_pretrained(tmp_path / "model")

        def by_batch(self, prompts, params, use_tqdm):
            self.params = params
            ids = [prompt["prompt_token_ids"] for prompt in prompts]
            rows = [
                {"prompt": row, "written": [], "params": p, "done": False} for row, p in zip(ids, params, strict=True)
            ]
            written = Batch(model, 3).run(rows, params[0].max_tokens)
            pairs = zip(written, params, strict=True)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=row)] * p.n) for row, p in pairs]

        vllm.LLM.generate = generate or by_batch
        return VLLMEngine(str(tmp_path / "model"), options=options)

    return make


@pytest.mark.parametrize("knob", [{}, {"think": "always"}, {"think": "never"}, {"think": "auto"}])
def test_an_engine_draws_what_generate_draws(wrapped, engine, knob):
    """With the head that decides in the checkpoint: the engine asks for its gate."""
    torch.manual_seed(0)
    head = AbstractionHead(AbstractionConfig(32, max_latent_length=3, trained_on=1))
    head.outer.weight.data.normal_(std=3.0)
    head.outer.bias.data.zero_()
    model = wrapped(head=head)
    drawing, settings = engine(model), CompletionSettings(max_new_tokens=20, stop=("\n\n",), **knob)
    prompts = [model.tokenizer(prompt).input_ids for prompt in PROMPTS]
    assert drawing.draw(prompts, settings) == [draw_completions(model, [ids], settings)[0] for ids in prompts]
    assert (drawing.options["dtype"], drawing.options["seed"]) == ("float32", 0)
    asked = [RequestThinking.of(params.extra_args) for params in drawing.llm.params if knob]
    assert all(thinking.gated == (knob["think"] == "auto") for thinking in asked)


def test_no_two_samples_of_an_engine_share_a_seed(wrapped, engine):
    """vLLM gives sample `i` of a request its seed plus `i`: three samples each of two prompts have 7 to 12."""
    model = wrapped()
    drawing, ids = engine(model), model.tokenizer(PROMPTS[0]).input_ids
    drawing.draw([ids] * 2, CompletionSettings(num_samples=3, temperature=0.5, max_new_tokens=2), seed=7)
    assert [(p.seed, p.n, p.temperature) for p in drawing.llm.params] == [(7, 3, 0.5), (10, 3, 0.5)]
    drawing.draw([ids] * 2, CompletionSettings(max_new_tokens=2), seed=2**31 - 1)
    assert [p.seed for p in drawing.llm.params] == [2**31 - 1, 0]  # vLLM takes no larger ones


def test_what_an_engine_holds_and_what_it_refuses(wrapped, engine):
    model = wrapped()
    assert engine(model).context_length == 2048 and engine(model, max_model_len=100).context_length == 100

    def refuses(*args, **words):
        raise _Refuses("temperature must be in [0, 2]")

    with pytest.raises(ValueError, match="vLLM refuses the request: temperature must be"):
        engine(model, refuses).draw([[5]], CompletionSettings(temperature=5.0, max_new_tokens=2))
    with pytest.raises(ValueError, match="a prompt has no tokens; give at least one"):
        engine(model).draw([[5], []], CompletionSettings())


def test_an_engine_whose_process_was_killed_is_given_up(wrapped, engine):
    """vLLM's own call, of which nothing is heard again, is not waited for."""
    never = threading.Event()
    drawing = engine(wrapped(), lambda *args, **words: never.wait())
    assert drawing.llm
    drawing._processes = [SimpleNamespace(is_alive=lambda: False)]
    with pytest.raises(OSError, match="vLLM's engine has stopped; .*the same command goes on"):
        drawing.draw([[5]], CompletionSettings(max_new_tokens=2))
    never.set()


# ---- GRPO's rollouts ----


class Engine:
    """TRL's `vllm_generation`: greedy, with the processor; it heeds no stop."""

    server_base_url, server_host, server_port = None, "node7", 8000

    def __init__(self, model, steered: bool = True, error: Exception | None = None):
        self.model, self.steered, self.error, self.generation_kwargs = model, steered, error, {}

    def generate(self, prompts, images, num_generations):
        if self.error:
            raise self.error
        self.count = num_generations
        words = self.generation_kwargs.get("extra_args") or self.generation_kwargs.get("vllm_xargs")
        params = SimpleNamespace(extra_args=words if self.steered else None)
        rows = [{"prompt": ids, "written": [], "params": params, "done": False} for ids in prompts]
        written = Batch(self.model, 4).run(rows, 16)
        return prompts, written, [[[-0.5 - n] for n in range(len(row))] for row in written], None


def grpo(monkeypatch, tmp_path, model, engine, **settings):
    pretend(monkeypatch, "0.31.0")
    args = GRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, use_vllm=True, max_completion_length=16, report_to="none",
        num_generations=2, per_device_train_batch_size=2, **{"vllm_mode": "colocate"} | settings,
    )  # fmt: skip
    return SimpleNamespace(
        args=args, processing_class=model.tokenizer, model_wrapped=model.pretrained_model, tools=None,
        model=SimpleNamespace(training=True), num_generations=2, num_generations_eval=1, vllm_generation=engine,
        accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_rollout_by_vllm_is_that_of_generate(wrapped, monkeypatch, tmp_path, mode):
    """Tokens, masks and texts as without, but greedy; each token has the log-prob that vLLM drew it with, the end that
    is put behind a stop 0. `rollout` runs twice: to see a text, and with a stop from its middle."""
    model = wrapped()
    trainer = grpo(monkeypatch, tmp_path, model, Engine(model), vllm_mode=mode)
    prompts, stop = [PROMPTS[0]] * 2, ()
    for _ in range(2):
        rollout = CompletionRollout(stop, "always", max_latent_length=3)
        out = rollout(prompts, trainer)
        model.abstraction_head.config = AbstractionConfig(model.config.hidden_size, max_latent_length=3)
        expected = by_generate(model, PROMPTS[0], max_new_tokens=16, think="always", stop=stop)
        ids, logps, mask = out["completion_ids"][0], out["logprobs"][0], out["env_mask"][0]
        assert tuple(ids[: len(expected.token_ids)]) == expected.token_ids
        assert out["completion_text"] == [expected.text] * 2 and trainer.vllm_generation.count == 2
        assert len(ids) == len(logps) == len(mask) == len(expected.token_ids) + bool(stop)
        assert logps[: len(expected.token_ids)] == [-0.5 - n for n in range(len(expected.token_ids))]
        assert mask[: len(expected.forced)] == [int(not forced) for forced in expected.forced] and 0 in mask
        stop = (expected.text[4:6],)
    assert (ids[-1], logps[-1], mask[-1]) == (model.tokenizer.eos_token_id, 0.0, 0)
    words = trainer.vllm_generation.generation_kwargs
    assert ("vllm_xargs" in words) == (mode == "server") and words["stop"] == [*rollout.stop]


def test_a_server_that_goes_away_or_does_not_think_is_named(wrapped, monkeypatch, tmp_path):
    model = wrapped()
    gone = Engine(model, error=requests.exceptions.ConnectionError("refused"))
    trainer = grpo(monkeypatch, tmp_path, model, gone, vllm_mode="server")
    with pytest.raises(ConnectionError, match="server at node7:8000 does not answer .*resume_from_checkpoint"):
        CompletionRollout()(PROMPTS[:1], trainer)
    gone.sync_weights = partial(gone.generate, (), None, 1)  # TRL calls it before each rollout
    watch_server(trainer)
    with pytest.raises(ConnectionError, match="server at node7:8000 does not answer .*resume_from_checkpoint"):
        gone.sync_weights()
    trainer.vllm_generation = Engine(model, steered=False)
    with pytest.raises(ValueError, match="vLLM wrote what that bans.*--logits-processors ra3_trl.generation"):
        CompletionRollout(think="always")(PROMPTS[:1], trainer)
    assert CompletionRollout()(PROMPTS[:1], trainer)["env_mask"][0][:3] == [1, 1, 1]


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_an_engine_that_does_not_start_is_named(wrapped, monkeypatch, tmp_path, mode):
    """What TRL and vLLM raise then are `RuntimeError`s, of which a user would see a traceback."""
    pretend(monkeypatch, "0.32.0")
    wrapped().save_pretrained(tmp_path / "model")
    wrapped().tokenizer.save_pretrained(tmp_path / "model")

    def fails(*args, **kwargs):
        raise NotImplementedError("Weight synchronization runs on NCCL, which needs a CUDA device")

    monkeypatch.setattr(rlvr_trainer, "_CarefulGRPOTrainer", fails)
    data = RLVRData(Dataset.from_list([{"prompt": PROMPTS[0], "test_list": ["assert f(1)"]}]))
    args = GRPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, use_vllm=True, vllm_mode=mode)
    with pytest.raises(OSError, match="`use_vllm` is True and the trainer does not start: Weight synchronization"):
        build_grpo_trainer(str(tmp_path / "model"), args, data)
    with pytest.raises(NotImplementedError):
        args.use_vllm = False
        build_grpo_trainer(str(tmp_path / "model"), args, data)


def test_as_many_completions_as_trl_asks_for(wrapped, monkeypatch, tmp_path):
    """In evaluation TRL repeats a prompt another number of times."""
    model = wrapped()
    trainer, counts = grpo(monkeypatch, tmp_path, model, Engine(model)), []
    for training in (True, False):
        trainer.model.training = training
        CompletionRollout()(PROMPTS[:1], trainer)
        counts.append(trainer.vllm_generation.count)
    assert counts == [2, 1]


def test_sharded_weights_roll_out_in_vllm(wrapped, monkeypatch, tmp_path):
    """They are refused without; vLLM holds whole ones."""
    model = wrapped()
    trainer = grpo(monkeypatch, tmp_path, model, Engine(model))
    trainer.accelerator.distributed_type = "FSDP"
    assert CompletionRollout()(PROMPTS[:1], trainer)["logprobs"]


# ---- the commands ----


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="`backend` is 'tgi'"):
        EvaluationSettings(backend="tgi")


def test_samples_of_another_backend_are_not_gone_on_with(tmp_path):
    """A run of before has no `backend`: it was transformers'."""
    now = {"settings": {}, "seed": 1, "backend": "vllm"}
    with pytest.raises(ValueError, match="`backend` was 'transformers' and not 'vllm'"):
        draw._check_same(tmp_path, {"settings": {}, "seed": 1}, now)
    draw._check_same(tmp_path, {"settings": {}, "seed": 1}, now | {"backend": "transformers"})
