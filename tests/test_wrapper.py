"""`AutoModelForCausalLMWithAbstractionHead`: forward, generation with the head's gate, files."""

from __future__ import annotations

import json
import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import _SETTINGS, furthest, weights
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer, pipeline

from ra3_trl.generation import AutoModelForCausalLMWithAbstractionHead, strip_latents
from ra3_trl.models import AbstractionConfig, AbstractionHead
from ra3_trl.rollout import Backbone


Wrapper = AutoModelForCausalLMWithAbstractionHead
PROMPT = "def f(x):\n    y = x + 1\n"


def trained(head: AbstractionHead) -> AbstractionHead:
    """A head that says it has learned something, different at each state."""
    with torch.no_grad():
        head.outer.weight.normal_(generator=torch.Generator().manual_seed(1))
    head.trained_on(100)
    return head


@pytest.fixture
def wrapper(tokenizers, tiny_model):
    """`wrapper("llama")`: a wrapper around a random model, its head trained in name."""

    def make(model_type: str = "llama", peft: bool = False) -> Wrapper:
        tokenizer = tokenizers["newline_indent"]
        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"]) if peft else None
        made = Wrapper.from_pretrained(tiny_model(model_type, tokenizer), peft_config=config, tokenizer=tokenizer)
        trained(made.abstraction_head)
        return made.eval()

    return make


# ---- forward ----


@pytest.mark.parametrize("model_type", list(_SETTINGS))
def test_it_reads_what_the_language_model_head_reads(wrapper, model_type, tokenizers):
    model = wrapper(model_type)
    ids = tokenizers["newline_indent"](PROMPT, return_tensors="pt")["input_ids"]
    out = model(input_ids=ids)
    backbone = Backbone(model.pretrained_model)
    states = backbone.hidden(input_ids=ids)
    torch.testing.assert_close(out.logits[0].float(), backbone.logits(states[0]), atol=1e-3, rtol=1e-3)
    # As the trainer catches them where the model's own forward must run (DDP).
    torch.testing.assert_close(backbone.hidden(model.pretrained_model, input_ids=ids), states)
    think_logits, gain, _ = model.abstraction_head(states)
    torch.testing.assert_close((out.think_logits, out.gain), (think_logits, gain), atol=1e-3, rtol=1e-3)
    assert out.loss is None and out.think_logits.shape == ids.shape


def test_loss_by_hand(wrapper, tokenizers):
    """Next-token loss + cross-entropy at the two labelled places + Huber loss at one."""
    model = wrapper()
    ids = tokenizers["newline_indent"](PROMPT, return_tensors="pt")["input_ids"]
    think = torch.full(ids.shape, -100.0)
    think[0, 3], think[0, 5] = 1.0, 0.25
    gain = torch.full(ids.shape, math.nan)
    gain[0, 4] = 100.0
    out = model(input_ids=ids, labels=ids, think_labels=think, gain_labels=gain)
    plain = model.pretrained_model(input_ids=ids, labels=ids).loss
    p = out.think_logits.sigmoid()[0]
    entropy = -(p[3].log() + 0.25 * p[5].log() + 0.75 * (1 - p[5]).log()) / 2
    error = (100.0 - out.gain[0, 4]).abs()
    assert error > 1  # the linear part: |error| - 1/2
    assert out.loss.item() == pytest.approx((plain + entropy + error - 0.5).item(), rel=1e-5)
    out.loss.backward()
    grads = weights_grad(model)
    model.zero_grad()
    model.pretrained_model(input_ids=ids, labels=ids).loss.backward()
    for name, grad in weights_grad(model).items():  # the head's loss does not reach the language model
        torch.testing.assert_close(grads[name], grad)
    assert any(name.startswith("abstraction_head") for name in grads)


def weights_grad(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("peft", [False, True])
def test_activation_checkpointing_changes_nothing(wrapper, tokenizers, peft):
    ids = tokenizers["newline_indent"](PROMPT, return_tensors="pt")["input_ids"]
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = wrapper(peft=peft).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model(input_ids=ids, labels=ids, think_labels=torch.ones(ids.shape)).loss.backward()
        grads.append(weights_grad(model))
    assert set(grads[0]) == set(grads[1])
    assert furthest(*grads) < 1e-5


# ---- generation ----


def test_the_gate_is_the_heads(wrapper, tokenizers):
    """A gate that is open everywhere is "always", a shut one "never"; the threshold parts them at its value."""
    model = wrapper()
    inputs = tokenizers["newline_indent"]([PROMPT, "x = 1\n"], return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 24, "do_sample": False}
    texts = {think: model.generate(**inputs, think=think, **options) for think in ("always", "never")}
    assert not torch.equal(texts["always"], texts["never"])
    with torch.no_grad():
        model.abstraction_head.outer.weight.zero_()
        model.abstraction_head.outer.bias[0] = math.log(0.7 / 0.3)
    assert torch.equal(model.generate(**inputs, think="auto", **options), texts["always"])
    assert torch.equal(model.generate(**inputs, think="auto", threshold=0.69, **options), texts["always"])
    assert torch.equal(model.generate(**inputs, think="auto", threshold=0.71, **options), texts["never"])


def test_the_gate_sees_the_state_at_the_boundary(wrapper, tokenizers):
    """The prompt ends at a boundary: the first decision is by the head's P(think) there, from one plain forward."""
    model, tokenizer = wrapper(), tokenizers["newline_indent"]
    inputs = tokenizer(PROMPT, return_tensors="pt")
    p = float(model(**inputs).think_logits[0, -1].sigmoid())
    for threshold, thinks in ((max(p - 0.01, 0), True), (min(p + 0.01, 1), False)):
        out = model.generate(**inputs, threshold=threshold, max_new_tokens=4, do_sample=False)
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
        assert text.lstrip().startswith("#") == thinks, (threshold, text)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_beams_and_several_sequences(wrapper, tokenizers, options):
    model, tokenizer = wrapper(), tokenizers["newline_indent"]
    inputs = tokenizer([PROMPT, "x = 1\n"], return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(0)
    out = model.generate(**inputs, think="never", max_new_tokens=16, **options)
    for row in out:
        text = tokenizer.decode(row, skip_special_tokens=True)
        assert strip_latents(text) == text


def test_pipeline_and_streaming(wrapper, tokenizers, capsys):
    model, tokenizer = wrapper(), tokenizers["newline_indent"]
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    texts = [generator(PROMPT, think=think, **options)[0]["generated_text"] for think in ("always", "never")]
    assert texts[0].lstrip().startswith("#") and not texts[1].lstrip().startswith("#")
    capsys.readouterr()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    model.generate(**inputs, think="always", max_new_tokens=12, do_sample=False, streamer=streamer)
    assert capsys.readouterr().out.strip() == texts[0].strip()


def test_a_fresh_head_leaves_it_to_the_tokens(wrapper, tokenizers):
    model = wrapper()
    model.abstraction_head = AbstractionHead(AbstractionConfig(32, think_prob=0.99))
    inputs = tokenizers["newline_indent"](PROMPT, return_tensors="pt")
    options = {"max_new_tokens": 16, "do_sample": False}
    always = model.generate(**inputs, think="always", **options)
    assert not torch.equal(model.generate(**inputs, think="auto", **options), always)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"think": "sometimes"}, "`think` is 'sometimes'"),
        ({"threshold": 1.5}, "`threshold` is 1.5"),
        ({"think": "never", "threshold": 0.5}, "`threshold` is 0.5"),
        ({"prompt_lookup_num_tokens": 2}, "`prompt_lookup_num_tokens` runs more than the text's last token"),
        ({"guidance_scale": 1.5}, "`guidance_scale` runs more"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)}, "`prompt_lookup_num_tokens` runs more"),
    ],
)
def test_bad_options_are_refused(wrapper, tokenizers, options, says):
    with pytest.raises(ValueError, match=says):
        wrapper().generate(**tokenizers["newline_indent"](PROMPT, return_tensors="pt"), **options)


@pytest.mark.parametrize("name", ["think_labels", "gain_labels"])
def test_a_batch_without_labels_of_a_kind_has_a_loss(wrapper, name):
    ids = torch.arange(5, 15)[None]
    none = torch.full(ids.shape, -100.0 if name == "think_labels" else math.nan)
    model = wrapper()
    found, plain = model(ids, torch.ones_like(ids), labels=ids, **{name: none}), model(input_ids=ids, labels=ids)
    assert found.loss.item() == pytest.approx(plain.loss.item())
    assert model(ids, return_dict=False).think_logits.shape == ids.shape


def test_a_tokenizer_is_wanted(wrapper):
    model = wrapper()
    model.tokenizer = None
    with pytest.raises(ValueError, match="`tokenizer` is missing"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=2)


# ---- files ----


@pytest.mark.parametrize("peft", [False, True])
def test_what_is_saved_is_a_plain_checkpoint(wrapper, tmp_path, peft, caplog):
    model = wrapper()
    if peft:
        model.pretrained_model.save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = Wrapper.from_pretrained(base, peft_config=LoraConfig(r=4, init_lora_weights=False))
        trained(model.abstraction_head)
    model.eval().save_pretrained(str(tmp_path / "saved"))
    names = {p.name for p in (tmp_path / "saved").iterdir()}
    assert {"abstraction_head.safetensors", "abstraction_config.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # nothing is left aside
    ids = torch.arange(5, 25)[None]
    wanted = model(input_ids=ids)
    with caplog.at_level(logging.WARNING):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
        again = Wrapper.from_pretrained(str(tmp_path / "saved")).eval()
    assert not [r.message for r in caplog.records if "keys" in r.message.lower() or "unexpected" in r.message.lower()]
    torch.testing.assert_close(plain(input_ids=ids).logits, wanted.logits)
    found = again(input_ids=ids)
    torch.testing.assert_close(
        (found.logits, found.think_logits), (wanted.logits, wanted.think_logits), atol=1e-4, rtol=1e-4
    )
    assert again.abstraction_head.config == model.abstraction_head.config
    if not peft:
        assert furthest(weights(again), weights(model)) == 0
    assert isinstance(model.pretrained_model, PeftModel) == peft


def test_state_dict_is_the_models_and_the_heads(wrapper):
    model, other = wrapper(), wrapper()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    state = model.state_dict()
    plain = model.pretrained_model.state_dict()
    assert {name for name in state if not name.startswith("abstraction_head.")} == set(plain)
    assert {name for name in state if name.startswith("abstraction_head.")} == {
        f"abstraction_head.{name}" for name in model.abstraction_head.state_dict()
    }
    other.load_state_dict(state)  # strict: no name is missing, none too many
    assert furthest(weights(model), weights(other)) == 0
    wrapped = torch.nn.ModuleDict({"a": model}).state_dict()  # as DDP asks for it
    assert set(wrapped) == {f"a.{name}" for name in state}
    with torch.no_grad():
        other.lm_head.weight.zero_()
    torch.nn.ModuleDict({"a": other}).load_state_dict(wrapped)
    assert furthest(weights(model), weights(other)) == 0


def test_gathered_weights_can_be_saved(wrapper, tmp_path):
    """`save_pretrained(state_dict=...)`, as for sharded models: what is given is saved, head included."""
    model = wrapper()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    again = Wrapper.from_pretrained(str(tmp_path))
    assert all(not value.any() for value in again.state_dict().values())
    assert model.abstraction_head.outer.weight.any()


def test_a_failed_save_leaves_the_folder_as_it_was(wrapper, tmp_path, monkeypatch):
    model = wrapper()
    model.save_pretrained(tmp_path / "saved")
    before = {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("ra3_trl.generation.wrapper.save_head", fail)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path / "saved")
    assert {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_saving_over_another_checkpoint_leaves_none_of_its_weights(wrapper, tmp_path):
    wrapper().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    (tmp_path / "notes.txt").write_text("mine")
    model = wrapper("gpt2")
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert furthest(weights(Wrapper.from_pretrained(str(tmp_path))), weights(model)) == 0


def test_a_plain_checkpoint_gets_a_fresh_head_and_it_says_so(wrapper, tmp_path, caplog):
    wrapper().pretrained_model.save_pretrained(tmp_path)
    logger = logging.getLogger("ra3_trl")
    logger.addHandler(caplog.handler)
    try:
        model = Wrapper.from_pretrained(str(tmp_path))
    finally:
        logger.removeHandler(caplog.handler)
    assert "has no abstraction head; a fresh one is used" in caplog.text
    assert model.abstraction_head.config.trained_on == 0 and model.ra3_config is None


def test_a_head_of_another_model_is_refused(wrapper, tiny_model, tokenizers, tmp_path):
    with pytest.raises(ValueError, match="for hidden states of 8 numbers, and the model's have 32"):
        Wrapper(tiny_model("llama", tokenizers["newline_indent"]), AbstractionHead(AbstractionConfig(8)))
    wrapper().save_pretrained(tmp_path)
    path = tmp_path / "abstraction_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 64}))
    with pytest.raises(ValueError, match="`hidden_size` of the abstraction head of .* is 64"):
        Wrapper.from_pretrained(str(tmp_path))


def test_an_adapter_does_not_take_its_bases_place(tiny_model, tokenizers, tmp_path):
    """Saved into its base's folder, twice: base and card stay; a full model saved over it takes its place."""
    base = tiny_model("llama", tokenizers["newline_indent"])
    base.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "adapter_1").mkdir()
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = Wrapper.from_pretrained(base, peft_config=LoraConfig(r=4, init_lora_weights=False))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "README.md").read_text() == "mine"
    again = Wrapper.from_pretrained(str(tmp_path))
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    Wrapper(model.pretrained_model.merge_and_unload()).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter_*.*")) and (tmp_path / "adapter_1").is_dir()


def test_another_process_writes_nothing(wrapper, tmp_path):
    model = wrapper()
    model.save_pretrained(tmp_path / "saved")
    before = {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}
    model.push_to_hub = pytest.fail  # nor does it push
    model.save_pretrained(tmp_path / "saved", is_main_process=False, push_to_hub=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()} == before


def test_a_linked_folder_is_written_through(wrapper, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "far")
    wrapper().save_pretrained(tmp_path / "run")
    assert (tmp_path / "run").is_symlink() and (tmp_path / "far" / "model.safetensors").exists()


def test_a_file_in_the_way_is_refused(wrapper, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="`save_directory` is .* which is a file"):
        wrapper().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_trainer_takes_the_wrapper_and_its_checkpoint_comes_back(wrapper, make_trainer, tmp_path):
    model = wrapper()
    trainer = make_trainer([PROMPT + "    return y\n"] * 4, model=model)
    assert trainer.loop.learner.head.config.trained_on == 100  # the wrapper's
    trainer.train()
    trainer.save_model()
    again = Wrapper.from_pretrained(str(tmp_path / "run"))
    assert again.ra3_config.max_latent_length == 4 and again.abstraction_head.config.trained_on > 100
    again.save_pretrained(tmp_path / "copy")
    assert Wrapper.from_pretrained(str(tmp_path / "copy")).settings == again.settings


# ---- several threads ----


def test_threads_have_their_own_states(wrapper, tokenizers):
    """Two texts of other batch sizes, in step with each other: each thread waits before a token is chosen, so that the
    other's forward lies between its own and what the gate reads."""
    model, tokenizer = wrapper(), tokenizers["newline_indent"]
    with torch.no_grad():  # its P(think) varies a lot from state to state
        for p in model.abstraction_head.parameters():
            p.copy_(3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    batches = [tokenizer([PROMPT] * n, return_tensors="pt")["input_ids"] + 0 for n in (1, 2)]
    batches[1][1, 2] = tokenizer("z", add_special_tokens=False)["input_ids"][0]
    barrier = threading.Barrier(2, timeout=30)

    def generate(ids: torch.Tensor, wait: bool) -> list[list[int]]:
        def in_step(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if wait:
                barrier.wait()
            return scores

        options = {"do_sample": False, "min_new_tokens": 24, "max_new_tokens": 24, "logits_processor": [in_step]}
        return model.generate(ids, threshold=0.5, **options).tolist()

    alone = [generate(ids, False) for ids in batches]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(generate, batches, (True, True)))
    assert together == alone
