"""`Policy`: what it opens, that it does what the trainer does, and that it leaves the rest of the process alone."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import furthest, weights
from peft import LoraConfig
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ra3_trl import AutoModelForCausalLMWithAbstractionHead, Policy, RA3Config, ThinkLogitsProcessor
from ra3_trl.losses import compute_returns
from ra3_trl.models import AbstractionConfig, AbstractionHead, save_head
from ra3_trl.policy import EVAL_NOISE, evaluate_documents, finish_metrics, most_thinking
from ra3_trl.rollout import NoiseKey
from ra3_trl.segmentation import row_to_document


TEXTS = [f"def f{i}(x):\n    y = x + {i}\n    if y > {i}:\n        return y\n    return x\n" for i in range(4)]
SETTINGS = {"max_length": 128, "num_latents": 2, "max_latent_length": 5, "horizon": 3, "discount": 0.5,
            "prior_alpha": 0.5}  # fmt: skip


@pytest.fixture
def trained(make_trainer, tmp_path):
    """A trainer after two updates, and the folder it saved to."""
    trainer = make_trainer(TEXTS, TEXTS[:2], e_steps=1, m_steps=1, **SETTINGS)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    return trainer, str(tmp_path / "saved")


@pytest.fixture
def base(tmp_path, tiny_model, tokenizers) -> str:
    """A folder with a model that was never mid-trained."""
    tiny_model("llama", tokenizers["newline_indent"]).save_pretrained(tmp_path / "base")
    tokenizers["newline_indent"].save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def open_here(*names, **changes) -> Policy:
    return Policy.open(*names, use_cpu=True, **changes)


# ---- what is opened ----


def test_a_checkpoint_thinks_as_it_was_trained_to(trained):
    trainer, folder = trained
    policy = open_here(folder)
    assert {name: getattr(policy.args, name) for name in SETTINGS} == SETTINGS
    assert policy.args.seed == 42 and policy.args.learning_rate == RA3Config.learning_rate  # not the training's
    assert furthest(weights(policy.model), weights(trainer.model)) == 0
    assert not any(module.training for module in policy.model.modules())
    other = open_here(Path(folder), num_latents=3, seed=7, horizon=1)
    assert (other.args.num_latents, other.args.horizon, other.args.max_latent_length, other.args.seed) == (3, 1, 5, 7)


def test_a_model_that_was_never_mid_trained(base):
    policy = open_here(base)
    assert policy.args.num_latents == RA3Config.num_latents and policy.head is None
    assert policy.rollout(policy.segment(TEXTS[0])[0]).num_latents == RA3Config.num_latents


def test_an_adapter_opens_on_its_base(make_trainer, base, tmp_path):
    trainer = make_trainer(TEXTS, TEXTS[:1], base, peft_config=LoraConfig(r=2, target_modules=["q_proj"]), e_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    policy = open_here(str(tmp_path / "adapter"))
    documents = [row_to_document(row) for row in trainer.eval_dataset]
    numbers = policy.evaluate(documents)
    assert numbers == pytest.approx(numbers_of(trainer), abs=1e-6)
    assert numbers["ce"] != pytest.approx(open_here(base).evaluate(documents)["ce"], abs=1e-6)


def test_a_model_at_hand_is_not_copied(tiny_model, tokenizers):
    tokenizer = tokenizers["newline_indent"]
    model = tiny_model("llama", tokenizer)
    policy = open_here(model, tokenizer=tokenizer, num_latents=2)
    assert policy.model is model and policy.tokenizer is tokenizer
    with pytest.raises(ValueError, match="no name to load a tokenizer by"):
        open_here(model)


def test_flash_attention_is_not_replaced_without_a_word(tiny_model, tokenizers, caplog):
    """Branches need a mask that flash attention has none of; the M-step keeps it. Here it is PyTorch's by such a name,
    which transformers would look for a kernel of."""
    AttentionInterface.register("flash_here", sdpa_attention_forward)
    AttentionMaskInterface.register("flash_here", sdpa_mask)
    for attention, engine, words in (("flash_here", "auto", 1), ("flash_here", "expand", 0), ("sdpa", "auto", 0)):
        model = tiny_model("llama", tokenizers["newline_indent"])
        model.set_attn_implementation = partial(setattr, model.config, "_attn_implementation")
        model.set_attn_implementation(attention)
        caplog.clear()
        policy = open_here(model, tokenizer=tokenizers["newline_indent"], num_latents=2, engine=engine)
        said = [r.getMessage() for r in caplog.records if "`attn_implementation` is 'flash_here'" in r.getMessage()]
        assert len(said) == words and model.config._attn_implementation == attention
        assert policy.engine.name == ("expand" if engine == "expand" else "branch")
        policy.rollout(policy.segment(TEXTS[0])[0])
        assert len(caplog.records) == words  # once, and not at each rollout


def test_a_model_with_its_head(trained, tokenizers):
    trainer, folder = trained
    wrapper = AutoModelForCausalLMWithAbstractionHead.from_pretrained(folder)
    policy = open_here(wrapper, gate="head")
    assert policy.model is wrapper.pretrained_model and policy.head.head is wrapper.abstraction_head
    assert {name: getattr(policy.args, name) for name in SETTINGS} == SETTINGS
    document = policy.segment(TEXTS[0])[0]
    group = policy.rollout(document)
    expected = policy.head.predict(group.states_SD)[0]
    torch.testing.assert_close(group.decision_logps_A[list(document.boundaries)], expected)
    assert open_here(folder).rollout(document).head_logps_A is None  # it was trained with the tokens' gate


@pytest.mark.parametrize("config", [{"think_prob": 0.3}, {"trained_on": 9, "action_format": "prose"}])
def test_a_head_that_knows_nothing_of_these_boundaries_is_left_out(base, config):
    RA3Config(use_cpu=True, report_to="none", gate="head", boundary_selection="head").save_pretrained(base)
    save_head(AbstractionHead(AbstractionConfig(32, **config)), base)
    policy = open_here(base)
    assert policy.head is None and (policy.args.gate, policy.args.boundary_selection) == ("token", "gate")
    save_head(AbstractionHead(AbstractionConfig(32, trained_on=9)), base)
    assert open_here(base).args.gate == "head"
    assert open_here(base, gate="token", boundary_selection="random", abstraction_head=False).head is None


# ---- it does what the trainer does ----


def numbers_of(trainer) -> dict[str, float]:
    """`trainer.evaluate()` without its prefix, and without what is no number of the policy's (these are SFT's)."""
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    for name in ("loss", "mean_token_accuracy", "entropy", "num_tokens"):
        metrics.pop(name)
    return {name: value for name, value in metrics.items() if "runtime" not in name and "per_second" not in name
            and name != "epoch"}  # fmt: skip


def test_documents_annotation_and_numbers_are_the_trainers(trained):
    trainer, folder = trained
    policy = open_here(folder)
    documents = [d for i, text in enumerate(TEXTS[:2]) for d in policy.segment(text, doc_id=i)]
    assert documents == [row_to_document(row) for row in trainer.eval_dataset]
    noise = NoiseKey(seed=3, phase=1, step=5)
    for document in documents:
        by_policy, by_trainer = (p.annotate(document, noise) for p in (policy, trainer.policy))
        assert by_policy.input_ids == by_trainer.input_ids and by_policy.gains == by_trainer.gains
        assert policy.text(by_policy).count("#") == len(by_policy.placed)
    assert any(policy.annotate(document, noise).placed for document in documents)
    expected = numbers_of(trainer)
    assert policy.evaluate(documents) == pytest.approx(expected, abs=1e-6)
    assert set(policy.evaluate(documents)) == set(expected)


def test_latents_score_as_they_did_when_they_were_drawn(base, slow_path):
    policy = open_here(base, num_latents=3, horizon=2, max_latent_length=4)
    document = policy.segment(TEXTS[1])[0]
    boundaries = document.boundaries[1:3]
    drawn = policy.rollout(document, boundaries)
    again = policy.score(document, boundaries, drawn.latents)
    torch.testing.assert_close(again.latent_line_logps_TGH, drawn.latent_line_logps_TGH, atol=1e-4, rtol=0)
    torch.testing.assert_close(again.gate_logps_A, drawn.gate_logps_A, atol=1e-4, rtol=0)
    slow = slow_path(policy.model, policy.tokenizer)
    line, _ = slow.branch(document, boundaries[0], drawn.latents[0][0], 1)[0]
    assert float(drawn.latent_line_logps_TGH[0, 0, 0]) == pytest.approx(float(line.detach()), abs=1e-3)
    assert policy.rollout(document, boundaries).latents == drawn.latents  # the same noise unless told otherwise
    assert policy.rollout(document, boundaries, noise=NoiseKey(1, 1, 1)).latents != drawn.latents
    assert policy.rollout(document, num_latents=1).num_latents == 1


def test_completions_are_the_wrappers(trained):
    trainer, folder = trained
    policy, prompt = open_here(folder), "def f(x):\n"
    for think in ("never", "always"):
        text = policy.generate(prompt, think, max_new_tokens=12, do_sample=False)
        wrapper = AutoModelForCausalLMWithAbstractionHead.from_pretrained(folder)
        inputs = trainer.processing_class(prompt, return_tensors="pt")
        output = wrapper.generate(**inputs, think=think, max_new_tokens=12, do_sample=False)
        assert text == trainer.processing_class.decode(output[0][inputs["input_ids"].shape[1] :])
        assert ("#" in text) == (think == "always")


@pytest.mark.parametrize("head", [False, True])
def test_completions_are_of_the_settings_format_and_length(base, head):
    """Whatever the checkpoint's head says, and where there is none: `//` and three tokens, not `#` and 12."""
    if head:
        save_head(AbstractionHead(AbstractionConfig(32, action_format="slashes", trained_on=1)), Path(base))
    policy, prompt = open_here(base, action_format="slashes", max_latent_length=3), "int f(int x) {\n"
    assert (policy.head is not None) == head
    always = ThinkLogitsProcessor(policy.tokenizer, "always", action_format="slashes", max_latent_length=3)
    inputs = policy.tokenizer(prompt, return_tensors="pt")
    options = {"max_new_tokens": 16, "do_sample": False}
    expected = policy.model.generate(**inputs, logits_processor=[always], **options)
    text = policy.generate(prompt, "always", **options)
    assert text == policy.tokenizer.decode(expected[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.lstrip().startswith("//")
    if head:
        assert policy.head.head.config.max_latent_length == 12  # it stays as it is


def test_ids_that_the_tokenizer_has_not_are_no_text(tiny_model, tokenizers):
    """Many models have more rows than their tokenizer has ids, and may write them: here the last one, always."""
    tokenizer = tokenizers["newline_indent"]
    policy = open_here(tiny_model("llama", tokenizer, vocab_size=len(tokenizer) + 8), tokenizer=tokenizer)
    head = policy.model.get_output_embeddings()
    with torch.no_grad():
        head.register_forward_hook(lambda module, args, output: output + 100 * torch.eye(output.shape[-1])[-1])
    for think in ("auto", "never"):
        assert policy.generate("x = 1\n", think, max_new_tokens=4, do_sample=False) == ""


@pytest.mark.parametrize("action_format", ["python", "python_tags"])
def test_texts_are_given_back(make_trainer, action_format):
    """Special tokens are left out, but for the tags that latents stand in."""
    policy = make_trainer(TEXTS, action_format=action_format, **SETTINGS).policy
    document = policy.segment(TEXTS[3])[0]
    assert policy.text(document) == TEXTS[3]
    example = policy.annotate(document)
    form = policy.segmenter.format
    assert example.placed and policy.text(example).count(form.think.strip()) == len(example.placed)


# ---- refusals ----


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_latent": 3}, "`num_latent` is no setting of a policy"),
        ({"learning_rat": 1}, "`learning_rat` is no setting of a policy"),
        ({"num_latents": 0}, "`num_latents` is 0"),
        ({"gate": "head"}, "`gate` is 'head', but .* has no trained abstraction head for 'python'; set `gate` to"),
        (
            {"boundary_selection": "head"},
            "`boundary_selection` is 'head', but .*; set `boundary_selection` to 'gate'",
        ),
        ({"action_format": "tags"}, "lacks the special tokens"),
        ({"action_format": "cobol"}, "`action_format` is 'cobol'"),
        ({"max_length": 100_000}, "`max_length` is 100000, but the model's context holds 2048"),
        ({"max_length": 16}, "`max_length` is 16: latents of max_latent_length=12 tokens leave no room"),
    ],
)
def test_what_cannot_work_is_refused(base, changes, says):
    with pytest.raises(ValueError, match=says):
        open_here(base, **changes)


def test_no_such_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer loads from"):
        open_here(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tokenizer loads from"):
        open_here(tmp_path / "empty")


def test_a_policy_without_a_segmenter_says_what_is_missing(base):
    policy = open_here(base)
    bare = Policy(policy.engine, policy.args)
    assert bare.rollout(policy.segment(TEXTS[0])[0]).latents
    with pytest.raises(ValueError, match="`segmenter` is missing"):
        bare.segment(TEXTS[0])


# ---- it leaves the rest alone ----


def test_nothing_is_written_and_no_weight_moves(base, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = {path: path.stat().st_mtime_ns for path in Path(base).iterdir()}
    policy = open_here(base, num_latents=2)
    values, (document,) = weights(policy.model), policy.segment(TEXTS[0])
    policy.annotate(document), policy.evaluate([document]), policy.generate("x = 1\n", max_new_tokens=2)
    assert list((tmp_path / "here").iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in Path(base).iterdir()} == before
    assert furthest(values, weights(policy.model)) == 0
    assert all(p.grad is None for p in policy.model.parameters())


def test_inference_restores_the_mode_of_each_module(base):
    policy = open_here(base)
    layers = policy.model.model.layers
    layers[0].train()
    layers[0].mlp.eval()
    modes = [module.training for module in policy.model.modules()]
    with pytest.raises(KeyError), policy.inference():
        assert not any(module.training for module in policy.model.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in policy.model.modules()] == modes and any(modes)
    policy.evaluate(policy.segment(TEXTS[0]))
    assert [module.training for module in policy.model.modules()] == modes


def test_trainers_that_are_there_go_on(make_trainer, base):
    """Settings are `TrainingArguments`, which empty the state that accelerators share."""
    trainer = make_trainer(TEXTS, TEXTS[:1], e_steps=1, m_steps=1, **SETTINGS)
    before = numbers_of(trainer)
    policy = open_here(base)
    assert numbers_of(trainer) == before
    trainer.train()
    policy.evaluate(policy.segment(TEXTS[0]))


def test_mixed_precision_is_that_of_the_settings(base):
    document = open_here(base).segment(TEXTS[0])[0]
    plain, half = open_here(base, num_latents=2), open_here(base, num_latents=2, bf16=True)
    with half.inference():
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    exact, rounded = (p.rollout(document, ()).line_logps_A for p in (plain, half))
    assert 0 < float((exact - rounded).abs().max()) < 1


def test_a_changed_copy_shares_the_model(base):
    policy = open_here(base, num_latents=2)
    args = copy.copy(policy.args)
    args.num_latents = 5
    other = policy.changed(args=args)
    document = policy.segment(TEXTS[0])[0]
    assert other.engine is policy.engine and policy.args.num_latents == 2
    assert other.rollout(document, document.boundaries[:1]).num_latents == 5


def test_sums_of_documents_add_up(base):
    """What processes and intervals need: the sums of two documents are those of each, added."""
    policy = open_here(base, num_latents=2)
    documents = [policy.segment(text, doc_id=i + 10)[0] for i, text in enumerate(TEXTS[:2])]
    with policy.inference():
        both, *each = (evaluate_documents(policy, part) for part in (documents, documents[:1], documents[1:]))
    # What is of a document and the one before is of no document alone.
    assert [sums["others"] for sums in (both, *each)] == [1, 0, 0]
    added = {name: each[0].get(name, 0) + each[1].get(name, 0) for name in both}
    assert both | {"over_other": 0, "others": 0} == pytest.approx(added)
    assert sum(count for name, count in both.items() if name.startswith("latent: ")) == 2


def test_evaluation_takes_documents_together_as_one_by_one(base, monkeypatch):
    """Any number of documents at once gives the same sums; four take as many trunks as one."""
    policy = open_here(base, num_latents=2, eval_num_latents=2, horizon=2)
    documents = [policy.segment(text, doc_id=i)[0] for i, text in enumerate(TEXTS)]
    together = evaluate_documents(policy, iter(documents))
    calls: list[int] = []
    rollouts = policy.engine.rollouts
    monkeypatch.setattr(policy.engine, "rollouts", lambda d, *rest: (calls.append(len(d)), rollouts(d, *rest))[1])
    monkeypatch.setattr(policy.engine, "max_branch_tokens", len(documents[0].input_ids))
    assert evaluate_documents(policy, documents) == pytest.approx(together, rel=1e-4, abs=1e-4)
    assert max(calls) == 1
    assert together["others"] == 3 and together["documents"] == 4


def test_latents_are_held_against_those_of_the_document_before(base):
    """Nats of the second document's latents where the model thinks most, less those of the first's there; a further
    chunk of the same text is no other document."""
    policy = open_here(base, num_latents=2, eval_num_latents=2)
    first, second = (policy.segment(text, doc_id=i)[0] for i, text in enumerate(TEXTS[:2]))
    before, own = (policy.rollout(document, noise=EVAL_NOISE) for document in (first, second))
    t, horizon = most_thinking(own), policy.args.horizon
    instead = policy.score(second, [own.boundaries[t]], [before.latents[most_thinking(before)]])
    returns = [compute_returns(group, horizon, policy.args.discount).latent_TG for group in (own, instead)]
    wanted = float(returns[0][t].mean() - returns[1][0].mean())
    assert wanted != 0
    again = replace(first, chunk=1)
    found = policy.evaluate([first, again, second])
    assert found["gain_over_other"] == pytest.approx(wanted, rel=1e-3)
    assert "gain_over_other" not in policy.evaluate([first, again])


def test_rates_of_what_latents_say(base):
    """Of 4 latents 3 say the same: half of them are different. Two processes' counts add up, and what both wrote is
    one text: `a` 3 and 1 times and `b` once are 2 / 5 and 4 / 5."""
    none = evaluate_documents(open_here(base), [])
    assert not {"gain_over_other", "distinct_rate", "most_frequent_rate"} & set(finish_metrics(none))
    one, other = Counter({"latent: a": 3, "latent: b": 1}), Counter({"latent: a": 1})
    for written, rates in ((one, (0.5, 0.75)), (one + other, (0.4, 0.8))):
        found = finish_metrics(none | written | {"over_other": 1.5, "others": 2})
        assert (found["distinct_rate"], found["most_frequent_rate"], found["gain_over_other"]) == (*rates, 0.75)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda policy, document: policy.rollout(document, [0]), "`boundaries` holds 0, where no latent may stand"),
        (
            lambda policy, document: policy.rollout(document, num_latents=0),
            "`num_latents` is 0; it must be at least 1",
        ),
        (lambda policy, document: policy.annotate(document, way="resamlpe"), "`way` is 'resamlpe'"),
        (lambda policy, document: policy.generate(["a"]), r"`prompt` is \['a'\]; give one text"),
        (lambda policy, document: policy.generate("a", num_return_sequences=2), "`num_return_sequences` is above 1"),
        (lambda policy, document: Policy.open(123), "`model` is 123; give a folder"),
        (lambda policy, document: Policy.open(policy.model, tokenizer="gpt2"), "`tokenizer` is 'gpt2'"),
    ],
)
def test_wrong_questions_are_answered_in_words(base, ask, says):
    policy = open_here(base, num_latents=2)
    document = policy.segment(TEXTS[0])[0]
    assert 0 not in document.boundaries
    with pytest.raises(ValueError, match=says):
        ask(policy, document)


def test_latents_are_drawn_without_dropout(base, monkeypatch):
    """A policy whose model is in training, as a trainer's is, thinks as it does in evaluation; the model goes on."""
    policy = open_here(base, num_latents=2)
    document, modes = policy.segment(TEXTS[0])[0], []
    for name in ("rollout", "score"):
        run = getattr(policy.engine, name)
        monkeypatch.setattr(
            policy.engine,
            name,
            lambda *args, run=run, **kwargs: (modes.append(policy.model.training), run(*args, **kwargs))[1],
        )
    policy.model.train()
    group = policy.rollout(document)
    policy.score(document, group.boundaries, group.latents)
    assert modes == [False, False] and policy.model.training
