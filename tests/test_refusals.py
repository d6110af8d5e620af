"""One table says what TRL has and RA3 has not, in Python, in YAML and on the command line, and what to set instead."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import yaml
from transformers import Trainer, TrainingArguments
from trl import GRPOConfig, SFTConfig, SFTTrainer

from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.cli import train
from ra3_trl.cli.launch import read_arguments
from ra3_trl.refusals import ARGUMENTS, SETTINGS, find


# Name and a value that RA3 refuses, as Python has it and as a word; what the message must say besides.
REFUSED = {
    "packing_strategy": ("wrapped", "wrapped", "use 'bfd_split'"),
    "eval_packing": (True, "true", "of documents, not of rows"),
    "pad_to_multiple_of": (8, "8", "leave it out"),
    "activation_offloading": (True, "true", "set `activation_checkpointing=True`"),
    "truncation_mode": ("keep_end", "keep_end", "nothing is truncated"),
    "torch_compile": (True, "true", "graphs would be built anew"),
    "neftune_noise_alpha": (5.0, "5.0", "leave it out"),
    "train_sampling_strategy": ("group_by_length", "group_by_length", "leave it out"),
    "beta": (0.0, "0.0", "set `kl_coef`"),
    "num_generations": (8, "8", "set `num_latents`"),
    "vllm_mode": ("server", "server", "leave it out"),
    "use_liger_kernel": (True, "true", "use_kernels"),
    "max_seq_length": (512, "512", "set `max_length`"),
    "latent_weight": ("gate", "gate", "set `exploration`"),
}  # fmt: skip
TAKEN = {
    "packing_strategy": ("bfd_split", "bfd_split"),
    "eval_packing": (False, "false"),
    "pad_to_multiple_of": (None, "none"),
    "padding_free": (True, "true"),
    "activation_offloading": (False, "false"),
    "truncation_mode": ("keep_start", "keep_start"),
    "vllm_mode": (None, "none"),
    "loss_type": ("chunked_nll", "chunked_nll"),
}  # fmt: skip


def by_words(*words: str) -> RA3Config:
    return read_arguments(train.make_parser(), ["--use_cpu", *words])[0][1]


def by_yaml(folder, **settings) -> RA3Config:
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return by_words("--config", str(folder / "config.yaml"))


def readers(tmp_path, name, value, word):
    """Each way to set `name`."""
    return (
        lambda: RA3Config(use_cpu=True, **{name: value}),
        lambda: by_words(f"--{name}", word),
        lambda: by_words(f"--{name.replace('_', '-')}={word}"),
        lambda: by_yaml(tmp_path, **{name: value}),
        lambda: by_yaml(tmp_path, **{name: word}),
    )


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_is_refused_alike_however_it_is_set(tmp_path, name):
    value, word, cure = REFUSED[name]
    said = set()
    for read in readers(tmp_path, name, value, word):
        with pytest.raises(ValueError, match=f"`{name}` is .*RA3 does not take: ") as error:
            read()
        said.add(str(error.value))
    (message,) = said
    assert repr(value) in message and cure in message


@pytest.mark.parametrize("name", TAKEN)
def test_what_says_what_ra3_does_anyway_is_taken(tmp_path, name):
    for read in readers(tmp_path, name, *TAKEN[name]):
        assert read().use_cpu


def test_no_padding_is_packing():
    assert RA3Config(use_cpu=True, padding_free=True).packing
    for read in (
        lambda: RA3Config(use_cpu=True, padding_free=True, packing=False),
        lambda: by_words("--padding_free", "--packing", "false"),
        lambda: by_words("--no_packing", "--padding_free"),
    ):
        with pytest.raises(ValueError, match="`padding_free` is True.*set `packing=True`"):
            read()


def test_every_setting_and_argument_of_sft_works_or_is_in_the_table():
    ours = {entry.name for entry in fields(RA3Config)}
    assert [e.name for e in fields(SFTConfig) if e.name not in ours and not find(SETTINGS, e.name)] == []
    assert [e.name for e in fields(GRPOConfig) if e.name not in ours and not find(SETTINGS, e.name)] == []
    taken = inspect.signature(RA3MidTrainer).parameters
    for trainer in (SFTTrainer, Trainer):
        names = set(inspect.signature(trainer).parameters)
        assert names - set(taken) <= set(ARGUMENTS)
    # And nothing is refused that RA3 has, but for values of its own fields.
    assert [name for name, entry in SETTINGS.items() if name in ours and name in dir(SFTConfig) and entry.refused == ()
            and name not in {e.name for e in fields(TrainingArguments)}] == []  # fmt: skip


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("eos_tokn", "did you mean `--eos_token`?"),
        ("num_latent", "did you mean `--num_latents`?"),
        ("mask_token", "see `ra3 train --help`."),  # the nearest word is `--pad_token`, which is another thing
        ("save_mode", "see `ra3 train --help`."),
        ("tok", "see `ra3 train --help`."),
    ],
)
def test_an_unknown_word_suggests_nothing_unrelated(word, hint):
    with pytest.raises(ValueError) as error:
        by_words(f"--{word}", "x")
    assert str(error.value) == f"`--{word}` is no option of `ra3 train`; {hint}"


def test_unknown_settings_of_a_configuration():
    with pytest.raises(ValueError, match=r"`num_latent` is no setting of `RA3Config`; did you mean `num_latents`\?$"):
        RA3Config(num_latent=3)
    with pytest.raises(ValueError, match="`RA3Config` is given `output_dir` twice"):
        RA3Config("a", output_dir="b")
