"""Private methods of `transformers.Trainer` that are overridden: which, why, and whether a release has changed them.

A failure here is no fault of ours: read what the release does now, mend the override, then these lines.
"""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer

from ra3_trl import RA3MidTrainer
from ra3_trl.hub import HubMixin, PushMixin
from ra3_trl.saving import SavingMixin


# Name -> what it takes, and where `Trainer` calls it.
OVERRIDDEN = {
    "_init_training_state": (
        ["max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"],
        "_inner_training_loop",
        "epochs_trained, steps_trained_in_current_epoch = self._init_training_state(",
    ),
    "_save": (["output_dir", "state_dict"], "save_model", "self._save(output_dir, state_dict=state_dict)"),
    "_save_checkpoint": (["model", "trial"], "_maybe_log_save_evaluate", "self._save_checkpoint(model, trial)"),
    "_load_best_model": ([], "_finalize_training", "self._load_best_model()"),
    "_push_from_checkpoint": (
        ["checkpoint_folder"],
        "_save_checkpoint",
        "self._push_from_checkpoint(output_dir)",
    ),
}


def test_no_other_private_method_is_overridden():
    own = {
        name
        for cls in (RA3MidTrainer, SavingMixin, HubMixin, PushMixin)
        for name in vars(cls)
        if not name.startswith("__")
    }
    assert {name for name in own if name.startswith("_") and name in dir(Trainer)} == set(OVERRIDDEN)


def test_the_mixins_are_three_in_a_row():
    assert RA3MidTrainer.__mro__[1:5] == (SavingMixin, HubMixin, PushMixin, Trainer)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_a_release_that_changes_them_is_noticed(name):
    parameters, caller, call = OVERRIDDEN[name]
    assert list(inspect.signature(getattr(Trainer, name)).parameters)[1:] == parameters
    assert call in inspect.getsource(getattr(Trainer, caller))


def test_checkpoints_are_written_where_output_dir_says():
    """Saving aside changes `args.output_dir`, which `Trainer` must read when it saves."""
    assert "self.args.output_dir" in inspect.getsource(Trainer._get_output_dir)
    assert "self._get_output_dir(trial=trial)" in inspect.getsource(Trainer._save_checkpoint)


def test_each_has_its_reason_beside_it():
    """A comment above the method says why there is no public way."""
    for cls in (RA3MidTrainer, SavingMixin, HubMixin, PushMixin):
        lines = inspect.getsource(cls).split("\n")
        for name in OVERRIDDEN:
            at = next((i for i, line in enumerate(lines) if line.startswith(f"    def {name}(")), None)
            assert at is None or lines[at - 1].startswith("    # "), name
