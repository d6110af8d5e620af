"""Why a cell of docs/versions.md is red: one row for each kind of failure, in place of a long list of tests."""

from fnmatch import fnmatch


# (environment, test, why); shell patterns for the first two. A failure without a row here fails `make test-versions`.
REASONS: tuple[tuple[str, str, str], ...] = (
    (
        "lowest",
        "test_trainer.py::test_eval_loss_is_that_of_sft?llama-prompt?",
        "TRL 1.8 masks as many tokens as the prompt alone has, also where prompt and completion share one",
    ),
    *(
        ("lowest", f"test_like_sft.py::{tests}", "TRL 1.8 masks as many tokens as the prompt alone has, as above")
        for tests in ("test_prompts_and_completions?*", "test_completion_only_loss?*", "test_streams?pairs?")
    ),
    (
        "lowest",
        "test_like_sft.py::*mamba*",
        "TRL 1.8's SFTTrainer reads `past_key_values`, which Mamba's outputs have not",
    ),
    ("trl-1.8", "test_rlvr.py::test_a_stream*", "TRL 1.8's GRPOTrainer takes no iterable data set"),
    (
        "lowest",
        "test_hub.py::test_an_interrupted_*_is_tried_again",
        "huggingface_hub 1.5 gives up where later ones try again: a cut connection, an answer 503",
    ),
    (
        "hub-1.5",
        "test_hub.py::test_an_interrupted_*_is_tried_again",
        "huggingface_hub 1.5 gives up where later ones try again: a cut connection, an answer 503",
    ),
)


def reason(cell: str, test: str) -> str | None:
    """Returns why `test` fails in the environment `cell`, or None where nobody has said."""
    return next((why for cells, tests, why in REASONS if fnmatch(cell, cells) and fnmatch(test, tests)), None)
