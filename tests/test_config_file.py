"""`ra3_config.json`: what a checkpoint says about the run that made it."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from ra3_trl import RA3Config, config_file
from ra3_trl.config_fields import FORMER, own_fields
from ra3_trl.em import checkpoint
from ra3_trl.policy import THINKING


TEXTS = [f"def f{i}(x):\n    y = x + {i}\n    return y\n" for i in range(4)]


def test_settings_come_back(tmp_path):
    """Own fields and those that shape training; no path, token, tracker or number of processes."""
    secret = "not-a-real-token"
    args = RA3Config(
        output_dir=str(tmp_path / "run"), horizon=3, penalty=0.4, learning_rate=3e-4, lr_scheduler_type="cosine",
        reward_weights=[1.0, 0.5], hub_token=secret, hub_model_id="org/name", model_init_kwargs={"token": secret},
        dataset_num_proc=2, report_to="none", use_cpu=True, seed=11,
    )  # fmt: skip
    args.save_pretrained(tmp_path)
    text = (tmp_path / "ra3_config.json").read_text()
    assert secret not in text and str(tmp_path) not in text and "org/name" not in text
    again = RA3Config.from_pretrained(str(tmp_path), output_dir=str(tmp_path / "other"), use_cpu=True)
    for name in ("horizon", "penalty", "learning_rate", "lr_scheduler_type", "reward_weights", "seed", "gate"):
        assert getattr(again, name) == getattr(args, name), name
    assert again.output_dir == str(tmp_path / "other") and again.dataset_num_proc is None


def test_a_length_that_follows_from_the_data_is_not_kept(make_trainer, tmp_path):
    """One pass over 4 texts, 2 an update, is 2 M-updates and `max_steps` 4 in the trainer; over 8 texts it is 4."""
    trainer = make_trainer(TEXTS, m_steps=-1, num_train_epochs=1)
    assert trainer.args.max_steps == 4
    trainer.save_model()
    args = RA3Config.from_pretrained(str(tmp_path / "run"), output_dir=str(tmp_path / "again"), use_cpu=True)
    assert (args.max_steps, args.m_steps) == (-1, -1)
    settings = {"m_steps": args.m_steps, "max_steps": args.max_steps, "num_train_epochs": args.num_train_epochs}
    assert make_trainer(TEXTS * 2, **settings).schedule.m_steps == 4


def test_infinity_is_valid_json(tmp_path):
    RA3Config(penalty=math.inf, use_cpu=True).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "ra3_config.json").read_text(), parse_constant=pytest.fail)
    assert found["settings"]["penalty"] == "inf"
    assert RA3Config.from_pretrained(str(tmp_path), use_cpu=True).penalty == math.inf


def test_a_run_can_be_done_again_from_its_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(TEXTS, horizon=1, save_strategy="steps", save_steps=4)
    trainer.train()
    for folder in (tmp_path / "run" / "checkpoint-4", tmp_path / "run"):
        if folder.name == "run":
            trainer.save_model()
        args = RA3Config.from_pretrained(str(folder), output_dir=str(tmp_path / "again"), use_cpu=True)
        assert (args.horizon, args.e_steps, args.m_steps, args.max_length) == (1, 2, 2, 256)
    assert not list((tmp_path / "run").rglob("*.bin"))  # no pickle: `training_args.bin` holds the Hub's token


def test_version_1_is_what_older_checkpoints_kept(make_trainer, tmp_path):
    """Before there was an abstraction head, `ra3_state.json` held the settings, beside facts of the run."""
    trainer = make_trainer(TEXTS, save_strategy="steps", save_steps=4, horizon=1)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-4"
    (folder / "ra3_config.json").unlink()
    state = json.loads((folder / "ra3_state.json").read_text())
    newer = ("abstraction_head", "gate", "boundary_", "annotation_skip")
    state["settings"] = {k: v for k, v in state["settings"].items() if not k.startswith(newer)}
    assert {"world_size", "train_dataset", "reward_funcs"} <= set(state["settings"])
    (folder / "ra3_state.json").write_text(json.dumps(state))
    args = RA3Config.from_pretrained(str(folder), use_cpu=True)
    assert args.horizon == 1 and args.gate == "token" and args.abstraction_head is False


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"version": 2, "settings": {"horizon"', "ra3_config.json of .* is damaged"),
        ('{"version": 2}', "ra3_config.json of .* is damaged"),
        ('{"version": 5, "settings": {}}', "is of version 5, and this ra3-trl reads up to 4; upgrade"),
        ('{"version": 2, "settings": {"horizzon": 1}}', "fields that no `RA3Config` has: horizzon"),
        ('{"version": 2, "settings": {"horizon": 0}}', "`horizon` is 0; it must be at least 1"),
        (None, "has no ra3_config.json; it was not trained by RA3MidTrainer"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, says):
    if text is not None:
        (tmp_path / "ra3_config.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        RA3Config.from_pretrained(str(tmp_path), use_cpu=True)


def test_a_config_in_words_hides_tokens():
    args = RA3Config(hub_token="not-a-real-token", model_init_kwargs={"token": "nor-this-one"}, use_cpu=True, seed=11)
    for text in (repr(args), str(args), args.to_json_string()):
        assert "not-a-real-token" not in text and "nor-this-one" not in text and "11" in text
    assert args.hub_token == "not-a-real-token" and args.model_init_kwargs["token"] == "nor-this-one"


def test_an_older_pickle_does_not_stay(make_trainer, tmp_path):
    """`training_args.bin` of another trainer would go to the Hub with the folder, and the token in it."""
    trainer = make_trainer(TEXTS)
    (tmp_path / "run").mkdir(exist_ok=True)
    for name in ("training_args.bin", "mine.bin"):
        (tmp_path / "run" / name).write_bytes(b"x")
    trainer.save_model()
    assert [p.name for p in (tmp_path / "run").glob("*.bin")] == ["mine.bin"]


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"max_sites": 3, "eval_max_sites": 5}, {"max_boundaries": 3, "eval_max_boundaries": 5}),
        ({"annotation_think_prob": -1}, {"prior_alpha": None, "exploration": 0.0}),
        ({"annotation_think_prob": 0.25, "e_steps": 0}, {"prior_alpha": 0.75, "annotation": "resample"}),
        ({"annotation_think_prob": None, "e_steps": 0}, {"prior_alpha": 0.7, "annotation": None}),
        ({"gate_coef": 1.0, "gate_kl_coef": 0.0, "entropy_coef": 0.1, "head_learning_rate": 1e-3}, {"horizon": 2}),
        ({"proposal": "causal", "proposal_lines": 4, "proposal_kl_coef": 1.0}, {}),
        (
            {"latent_weight": "one", "baseline": "no_think"},
            {"exploration": 0.05, "objective": "elbo", "same_latent_tolerance": 1.0},
        ),
        ({"num_latents": 1, "baseline": "no_think"}, {"num_latents": 2}),
        ({"latent_weight": "gate"}, {"exploration": 0.0, "boundary_selection": "random", "boundary_budget": 0.5}),
    ],
)
def test_version_2_still_loads(tmp_path, older, newer):
    """Fields that went, changed their name or their sense: 1 - 0.25 = 0.75, and -1 was the model's own gate."""
    settings = {"annotation": "resample", "prior_alpha": 0.7, "horizon": 2, **older}
    (tmp_path / "ra3_config.json").write_text(json.dumps({"version": 2, "settings": settings}))
    args = RA3Config.from_pretrained(str(tmp_path), use_cpu=True)
    for name, value in newer.items():
        assert getattr(args, name) == value, name
    assert args.uses_latents == (settings.get("e_steps", 20) > 0 or settings.get("annotation_think_prob") is not None)


def test_fields_that_are_named_are_fields():
    """A table that names a field which a release has dropped refuses, saves or compares nothing, silently."""
    names = {field.name for field in dataclasses.fields(RA3Config)}
    named = {*FORMER.values(), *config_file._TRAINING, *config_file._OF_THE_MACHINE}
    assert named | checkpoint._FREE | {*checkpoint._SHARED, *THINKING} <= names


def test_every_own_field_says_what_it_means():
    text = RA3Config.__doc__
    for field in dataclasses.fields(RA3Config):
        if field.name in own_fields(RA3Config):
            assert field.metadata["help"] and f"{field.name} (`" in text, field.name


def test_former_names_are_taken_with_a_warning():
    with pytest.warns(FutureWarning, match="`max_sites` is now `max_boundaries`"):
        args = RA3Config(max_sites=3, use_cpu=True)
    assert args.max_boundaries == 3 and "max_sites" not in args.to_dict()


def test_a_configuration_of_ones_own():
    """The usual way of a subclass in this family of libraries."""

    @dataclasses.dataclass
    class Mine(RA3Config):
        extra: int = 1

        def __post_init__(self):
            super().__post_init__()

    assert Mine(extra=2, use_cpu=True).extra == 2
