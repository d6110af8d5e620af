"""Models as users have them: names, adapters, quantized, compiled, half precision, instruct checkpoints; odd ones."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3Config,
    GPTQConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from ra3_trl import AutoModelForCausalLMWithAbstractionHead, RA3Config, RA3MidTrainer
from ra3_trl.em import EMLoop
from ra3_trl.models import (
    BaseWeights,
    FrozenWeights,
    check_trainable,
    check_vocabulary,
    load_model,
    load_tokenizer,
    prepare_model,
)


TEXTS = [f"def f{i}(x):\n    y = x + {i}\n    if y > {i * 7}:\n        return y\n    return x\n" for i in range(6)]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


@pytest.fixture
def tokenizer(tokenizers):
    return tokenizers["newline_indent"]


@pytest.fixture
def llama(tiny_model, tokenizer):
    return tiny_model("llama", tokenizer)


@pytest.fixture
def folder(tmp_path, llama, tokenizer):
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def train(tmp_path, monkeypatch):
    """`train(model, tokenizer, bf16=True)`: a trainer after two E- and two M-updates."""

    def run(model, tokenizer=None, peft_config=None, steps=2, resume=None, **settings) -> RA3MidTrainer:
        defaults = {
            "output_dir": str(tmp_path / "run"), "max_length": 128, "e_steps": steps, "m_steps": steps,
            "num_latents": 2, "max_latent_length": 4, "learning_rate": 1e-3, "e_learning_rate": 1e-3,
            "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none", "log_latents_steps": 0,
            "disable_tqdm": True, "use_cpu": True, "logging_steps": 1,
        }  # fmt: skip
        AcceleratorState._reset_state(True)  # mixed precision is settled by the first trainer of a process
        args, data = RA3Config(**defaults | settings), Dataset.from_dict({"text": TEXTS})
        trainer = RA3MidTrainer(model, args, data, None, tokenizer, peft_config=peft_config)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield run
    AcceleratorState._reset_state(True)


def losses(trainer) -> list[float]:
    lines = [entry for entry in trainer.state.log_history if "phase" in entry]
    return [entry["loss"] if "loss" in entry else entry["estep/loss"] for entry in lines]


def first_code_loss(trainer) -> float:
    """Of the update before any weight has moved: the same texts under the same weights, so only rounding differs."""
    return next(e["estep/code_loss"] for e in trainer.state.log_history if "estep/code_loss" in e)


def storage(*tensors) -> int:
    """Bytes held, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# ---- names, dtypes, attention ----


def test_a_name_with_its_init_kwargs(folder):
    assert load_model(folder, None, None).dtype == torch.float32
    model = load_model(folder, {"dtype": "bfloat16", "attn_implementation": "eager", "revision": "main"}, None)
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="`model_init_kwargs` is set, but `model` is not a string"):
        load_model(model, {"dtype": "bfloat16"}, None)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        (BitsAndBytesConfig(load_in_4bit=True), "BitsAndBytesConfig.*pip install -U bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes.*pip install -U bitsandbytes"),
        (GPTQConfig(bits=4), "GPTQConfig.*pip install optimum"),
    ],
)
def test_a_missing_quantization_library_is_named_first(folder, quantization, says):
    """Before weights are fetched: the folder has none."""
    weights = next(Path(folder).glob("*.safetensors"))
    weights.unlink()
    with pytest.raises(ValueError, match=r"`model_init_kwargs\['quantization_config'\]` is " + ".*" + says):
        load_model(folder, {"quantization_config": quantization}, LoraConfig(**LORA))


def test_a_checkpoint_quantized_by_a_missing_library(folder):
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(folder)
    with pytest.raises(ValueError, match="the `quantization_config` of .* is gptq, which can't run here"):
        load_model(folder, None, LoraConfig(**LORA))


class QuantizedStub:
    quant_method = "bitsandbytes"

    def to_dict(self):
        return {"quant_method": self.quant_method}


def test_quantized_weights_need_an_adapter(llama):
    """A stub: bitsandbytes is not needed to see that the flag is honoured."""
    llama.is_quantized, llama.config.quantization_config = True, QuantizedStub()
    with pytest.raises(ValueError, match="quantized by bitsandbytes.*`peft_config`"):
        load_model(llama, None, None)
    model = load_model(llama, None, LoraConfig(**LORA, use_dora=True))
    dtypes = {("magnitude" in n, p.dtype) for n, p in model.named_parameters() if p.requires_grad}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}  # as TRL: QLoRA's adapters are bfloat16
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_the_trainer_hands_quantized_weights_and_adapter_over_together(llama, tokenizer, tmp_path):
    """Loading first and wrapping later would refuse them in between."""
    llama.is_quantized, llama.config.quantization_config = True, QuantizedStub()
    args = RA3Config(output_dir=str(tmp_path), report_to="none")
    model = prepare_model(llama, tokenizer, args, LoraConfig(**LORA), {})
    assert isinstance(model, PeftModel)
    with pytest.raises(ValueError, match="quantized by bitsandbytes.*`peft_config`"):
        prepare_model(model.unload(), tokenizer, args, None, {})


def test_compiled_models_are_refused(llama):
    with pytest.raises(ValueError, match="`model` is compiled: .* as it was before `torch.compile`"):
        load_model(torch.compile(llama), None, None)
    llama.compile()
    with pytest.raises(ValueError, match="`model` is compiled"):
        load_model(llama, None, None)


# ---- what is no causal language model of text ----


def test_encoder_decoders_are_refused(tokenizer, tmp_path):
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        load_model(T5ForConditionalGeneration(config), None, None)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        load_model(str(tmp_path), None, None)


def test_multimodal_and_other_checkpoints_are_refused(tmp_path):
    Gemma3Config().save_pretrained(tmp_path / "gemma3")
    with pytest.raises(ValueError, match="is multimodal .Gemma3Config.; pass its language model alone"):
        load_model(str(tmp_path / "gemma3"), None, None)
    AutoConfig.for_model("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="is a ViTConfig, which is no causal language model"):
        load_model(str(tmp_path / "vit"), None, None)


# ---- tokenizers ----


def test_a_folder_without_tokenizer(llama, tmp_path, train):
    llama.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no tokenizer loads from"):
        load_tokenizer(str(tmp_path / "bare"), None)
    with pytest.raises(ValueError, match="has no name to load a tokenizer by"):
        load_tokenizer("", None)


def test_vocabulary_and_embedding(tiny_model, tokenizer):
    n = len(tokenizer)
    with pytest.raises(ValueError, match=rf"ids up to {n - 1}, but the model embeds {n - 1} tokens.*\({n}\)"):
        check_vocabulary(tiny_model("llama", tokenizer, vocab_size=n - 1), tokenizer)
    check_vocabulary(tiny_model("llama", tokenizer), tokenizer)


@pytest.mark.parametrize("tied", [True, False])
def test_more_embeddings_than_tokens(tiny_model, tokenizer, train, tied):
    """Padded to a multiple of 64; the padding rows are never sampled and the checkpoint keeps its shape."""
    model = tiny_model("llama", tokenizer, tie_word_embeddings=tied, pad_token_id=None)
    model.resize_token_embeddings(len(tokenizer) + 40)
    trainer = train(model, tokenizer, steps=1)
    allowed = trainer.policy.engine.distribution.allowed(0, 1)
    assert len(allowed) == len(tokenizer) + 40 and not allowed[len(tokenizer) :].any()


# ---- adapters ----


def test_adapters_that_are_refused(llama):
    with pytest.raises(ValueError, match="`peft_config` is a dict; pass a `peft.PeftConfig`"):
        load_model(llama, None, {"r": 4})
    with pytest.raises(ValueError, match="virtual tokens"):
        load_model(llama, None, PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    adapted = get_peft_model(llama, LoraConfig(**LORA))
    with pytest.raises(ValueError, match="`model` is a PeftModel already"):
        load_model(adapted, None, LoraConfig(**LORA))
    assert load_model(adapted, None, None) is adapted


def test_of_several_adapters_the_active_one_is_trained(llama, tokenizer, train):
    model = get_peft_model(llama, LoraConfig(**LORA), adapter_name="one")
    model.add_adapter("two", LoraConfig(**LORA))
    model.set_adapter("two")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, tokenizer, reward_model="frozen")
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".two." in n} != set()


def test_an_adapter_loaded_for_inference(llama, tmp_path, tokenizer):
    get_peft_model(llama, LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    base = llama.__class__(llama.config)
    with pytest.raises(ValueError, match="no trainable parameter.*is_trainable=True"):
        check_trainable(load_model(PeftModel.from_pretrained(base, tmp_path / "adapter"), None, None))
    check_trainable(PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True))
    with pytest.raises(ValueError, match="float16"):
        check_trainable(base.half())


def test_a_snapshot_of_an_adapter_holds_no_base_weights(llama):
    """q (32 -> 32) and v (32 -> 16) of 2 layers, rank 4, 4 bytes: 2 * 4 * (32 + 32 + 32 + 16) * 4 = 3584."""
    model = get_peft_model(llama, LoraConfig(**LORA))
    frozen = FrozenWeights(model)
    assert storage(*frozen.values.values()) == 3584 < storage(*model.parameters()) / 20
    shared = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not shared & {v.untyped_storage().data_ptr() for v in frozen.values.values()}
    before = storage(*model.parameters())
    with frozen.applied():
        assert storage(*model.parameters()) == before  # the snapshot in the adapter's place, the same base


def test_tied_weights_are_kept_once_and_stay_tied(tiny_model, tokenizer):
    model = tiny_model("llama", tokenizer, tie_word_embeddings=True)
    frozen, ids = FrozenWeights(model), torch.arange(20)[None] + 5
    assert storage(*frozen.values.values()) == storage(*model.parameters())
    with torch.no_grad():
        wanted = model(ids).logits
        for p in model.parameters():
            p.add_(0.1)
        with frozen.applied():
            assert torch.equal(model(ids).logits, wanted)
            assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert not torch.allclose(model(ids).logits, wanted)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_snapshot_under_autocast_is_not_the_live_weights_cast(tiny_model, tokenizer):
    """Autocast keeps casts by parameter object, not by contents: a swap inside one context must drop them."""
    model = tiny_model("llama", tokenizer, tie_word_embeddings=False)
    frozen, ids = FrozenWeights(model), torch.arange(20)[None] + 5
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(ids).logits.float()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        live = model(ids).logits.float()
        with frozen.applied():
            assert torch.equal(model(ids).logits.float(), wanted)
        assert torch.equal(model(ids).logits.float(), live)
    assert not torch.allclose(live, wanted, atol=0.5)


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_base_weights_are_the_model_without_adapter(tiny_model, tokenizer, extra):
    base = tiny_model("llama", tokenizer, tie_word_embeddings=False)
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        plain = base(ids).logits
        model = get_peft_model(base, LoraConfig(**LORA | extra)).eval()
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
        frozen_by_user = next(n for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n)
        model.get_parameter(frozen_by_user).requires_grad_(False)  # as LoRA-FA
        trained = {n: p.requires_grad for n, p in model.named_parameters()}
        adapted = model(ids).logits
        weights = BaseWeights(model)
        with weights.applied():
            assert torch.equal(model(ids).logits, plain)
        with pytest.raises(KeyError), weights.applied():
            raise KeyError
        assert torch.equal(model(ids).logits, adapted) and not torch.allclose(adapted, plain, atol=1e-2)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trained


def test_base_weights_need_an_adapter(llama):
    with pytest.raises(ValueError, match="`reward_model` is 'base'.*LlamaForCausalLM"):
        BaseWeights(llama)


# ---- precision of whole runs ----


def test_whole_runs_in_bfloat16(folder, train):
    """Weights in bfloat16: a token's log-prob is off by at most 0.1 (derived in test_architectures.py)."""
    wanted = first_code_loss(train(load_model(folder, None, None), load_tokenizer(folder, None)))
    trainer = train(folder, model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.model.dtype == torch.bfloat16 and trainer.policy.engine.name == "branch"
    assert 0 < abs(first_code_loss(trainer) - wanted) < 0.1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("reward_model", ["live", "frozen"])
def test_whole_runs_under_autocast(folder, train, reward_model, monkeypatch):
    """`bf16=True`: float32 weights, every forward in bfloat16; sampled log-probs equal those of the update within 0.1
    (derived in test_architectures.py), so no importance ratio is needed."""
    from ra3_trl.rollout import BranchEngine

    seen, off = set(), []
    log_probs = BranchEngine.packed_log_probs

    def watched(self, pieces, *args, **kwargs):
        out = log_probs(self, pieces, *args, **kwargs)
        for (group, part), logps in zip(pieces, out, strict=True):
            if torch.is_grad_enabled():
                rows = group.latents[part]
                sampled = torch.tensor([logp for row in rows for z in row for logp in z.logps])
                off.append(float((logps.token_n.detach() - sampled).abs().max()))
        seen.add(torch.is_autocast_enabled("cpu"))
        return out

    tokenizer = load_tokenizer(folder, None)
    wanted = first_code_loss(train(load_model(folder, None, None), tokenizer, reward_model=reward_model))
    monkeypatch.setattr(BranchEngine, "packed_log_probs", watched)
    trainer = train(load_model(folder, None, None), tokenizer, bf16=True, reward_model=reward_model)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert True in seen and max(off) < 0.1
    assert 0 < abs(first_code_loss(trainer) - wanted) < 0.1


def test_fp16_on_a_cpu_is_float32(llama, tokenizer, train, folder):
    """accelerate turns `fp16=True` off on a CPU without a word; a GPU has a gradient scaler."""
    wanted = losses(train(load_model(folder, None, None), tokenizer))
    trainer = train(load_model(folder, None, None), tokenizer, fp16=True)
    assert losses(trainer) == wanted and trainer.accelerator.scaler is None and not trainer.accelerator.native_amp


# ---- dropout, contexts ----


def test_dropout_left_on(tiny_model, tokenizer, train):
    model = tiny_model("gpt2", tokenizer, resid_pdrop=0.1)
    trainer = train(model, tokenizer, disable_dropout=False, steps=1)
    assert model.transformer.h[0].mlp.dropout.p == 0.1 and all(map(torch.isfinite, map(torch.tensor, losses(trainer))))


@pytest.mark.parametrize(
    ("disable_dropout", "expected"), [(None, {"E": 0.0, "M": 0.25}), (True, {"E": 0.0, "M": 0.0}),
                                      (False, {"E": 0.25, "M": 0.25})],
)  # fmt: skip
def test_dropout_acts_where_no_policy_is_trained(llama, tokenizer, train, monkeypatch, disable_dropout, expected):
    """`lora_dropout` as in `SFTTrainer` in M-phases; in E-phases the policy that is trained must be the one that
    sampled."""
    seen = {}

    def note(module, args):
        if module.training and torch.is_grad_enabled():
            seen.setdefault(trainer_phase[-1], set()).add(module.p)

    trainer_phase, backward = [], EMLoop.backward

    def noting(loop, batch, *args):
        trainer_phase.append(loop.phase.kind)
        return backward(loop, batch, *args)

    monkeypatch.setattr(EMLoop, "backward", noting)
    model = get_peft_model(llama, LoraConfig(**LORA, lora_dropout=0.25))
    drops = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)]
    for module in drops:
        module.register_forward_pre_hook(note)
    train(model, tokenizer, disable_dropout=disable_dropout)
    assert len(drops) == 4 and seen == {kind: {rate} for kind, rate in expected.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_former_name_of_dtype(llama, tokenizer, train, folder, dtype):
    """`from_pretrained` takes it, so `model_init_kwargs` does; with `dtype` beside it one would do nothing."""
    assert load_model(folder, {"torch_dtype": dtype}, None).dtype == torch.bfloat16
    wrapped = AutoModelForCausalLMWithAbstractionHead.from_pretrained(folder, torch_dtype=dtype)
    assert wrapped.pretrained_model.dtype == torch.bfloat16
    trainer = train(folder, tokenizer, model_init_kwargs={"torch_dtype": dtype})
    assert trainer.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`dtype` and `torch_dtype`, its former name"):
        load_model(folder, {"torch_dtype": dtype, "dtype": "float32"}, None)


def test_weights_with_strides_are_saved_and_resumed(llama, tokenizer, train, tmp_path):
    """As a conversion by transposes leaves them; safetensors takes contiguous ones only, the snapshots' too."""
    for name, p in llama.named_parameters():
        if "q_proj" in name:
            p.data = p.data.t().contiguous().t()
    assert not all(p.is_contiguous() for p in llama.parameters())
    wanted = train(copy.deepcopy(llama), tokenizer)
    train(copy.deepcopy(llama), tokenizer, save_strategy="steps", save_steps=1)
    assert not FrozenWeights(llama).values["model.layers.0.self_attn.q_proj.weight"].is_contiguous()
    resumed = train(llama, tokenizer, resume=str(tmp_path / "run" / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(wanted.model.parameters(), resumed.model.parameters(), strict=True))


def test_a_small_learned_context(tiny_model, tokenizer, train):
    """GPT-2 has no embedding behind its last position: sampling, scoring and annotating stay before it."""
    train(tiny_model("gpt2", tokenizer, n_positions=80), tokenizer, max_length=80, prior_alpha=0.001)
    with pytest.raises(ValueError, match="`max_length` is 128, but the model's context holds 80"):
        train(tiny_model("gpt2", tokenizer, n_positions=80), tokenizer)


# ---- instruct checkpoints ----


def test_instruct_checkpoint_keeps_template_and_generation_config(llama, tokenizers, train, tmp_path):
    """`tokenizer.eos_token` ends a document; the others of the generation config only end a latent."""
    tokenizer = AutoTokenizer.from_pretrained(_saved(tokenizers["newline_indent"], tmp_path / "tokenizer"))
    turn_end = tokenizer.pad_token_id
    llama.generation_config.eos_token_id = [tokenizer.eos_token_id, turn_end]
    llama.generation_config.update(max_length=77)
    trainer = train(llama, tokenizer, save_strategy="steps", save_steps=2)
    ids = trainer.train_dataset[0]["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and turn_end not in ids
    assert {tokenizer.eos_token_id, turn_end} <= set(trainer.policy.engine.table.stop_ids.tolist())
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-4"):
        again, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        assert again.chat_template == TEMPLATE
        assert again.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<|user|>x"
        assert again.eos_token == tokenizer.eos_token
        assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, turn_end]
        assert model.generation_config.max_length == 77


def _saved(tokenizer, folder) -> str:
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    again.chat_template = TEMPLATE
    again.save_pretrained(folder)
    return str(folder)
