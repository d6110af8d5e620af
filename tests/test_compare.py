"""`ra3 compare`: numbers by hand from results that are written here, and one run from checkpoints to the picture."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_bwrap
from datasets import Dataset
from PIL import Image

from ra3_trl.cli import compare, cross_entropy
from ra3_trl.cli.data import hold_out
from ra3_trl.cli.main import guarded
from ra3_trl.config_file import write_settings
from ra3_trl.evaluation import draw, paired_interval, share_interval
from ra3_trl.evaluation import evaluate as door
from ra3_trl.evaluation.compare import (
    Entrant,
    choose_ks,
    compare_runs,
    match_problems,
    read_entrants,
    sampling_notes,
)
from ra3_trl.report.compare import comparison_markdown, comparison_rows, plot_comparison


SETTINGS = {"num_samples": 4, "temperature": 0.8, "max_new_tokens": 64, "think": None, "threshold": None}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def results(
    passed: list[int], n: int = 4, plus: list[int] | None = None, task: str = "toy", k=(1,), tasks=None, **settings
):
    """What `ra3 evaluate` writes, of problems of which so many of `n` samples passed."""

    def verdicts(count):
        return ["passed"] * count + ["failed"] * (n - count)

    problems = {f"T/{i}": {"verdict": verdicts(count)} for i, count in enumerate(passed)}
    for i, count in enumerate(plus or []):
        problems[f"T/{i}"]["plus_verdict"] = verdicts(count)
    run = {
        "tasks": tasks,
        "limits": {"seconds": 3.0, "memory_mb": 512},
        "checkpoint": "gone",
        "weights": "0",
        "form": "complete",
        "dtype": "auto",
        "settings": SETTINGS | settings,
    }
    return {
        "task": task, "run": run, "num_tasks": len(passed), "num_samples": n, "problems": problems,
        "pass@k": {str(one): {"value": 0.0} for one in k}, "think_rate": 0.25, "latents_per_sample": 1.5,
        "verdicts": {"failed": n * len(passed) - sum(passed), "passed": sum(passed)}, "forgeable": 0,
        "tokens_per_sample": 20.0, "finished": 0.75,
    }  # fmt: skip


def write(name: str, found: dict) -> str:
    Path(name).mkdir(parents=True)
    Path(name, "results.json").write_text(json.dumps({"version": 1, **found}))
    return name


def run(*words: str) -> int:
    return guarded(compare.main, list(words))


def comparison(runs: dict[str, dict], ks=(1,)) -> dict:
    first = next(iter(runs.values()))
    return {"task": "toy", "num_tasks": first["num_tasks"], "models": compare_runs(runs, ks), "notes": []}


# ---- numbers ----


def test_numbers_by_hand():
    """4 samples. base: 0, 1, 4 pass: pass@1 = (0 + 1/4 + 1) / 3, pass@2 = (0 + 1/2 + 1) / 3, as 3 of the 6 pairs hold
    the one that passed. ra3: 1, 2, 4: (1/4 + 1/2 + 1) / 3 and (1/2 + 5/6 + 1) / 3."""
    base, ra3 = results([0, 1, 4], plus=[0, 0, 4]), results([1, 2, 4], plus=[0, 0, 2], think="auto")
    found = compare_runs({"base": base, "ra3": ra3}, [1, 2])
    one, two = found["ra3"]["pass@k"]["1"], found["ra3"]["pass@k"]["2"]
    assert found["base"]["pass@k"]["1"]["value"] == pytest.approx(5 / 12) and one["value"] == pytest.approx(7 / 12)
    assert one["difference"]["value"] == pytest.approx(1 / 6)
    assert two["value"] == pytest.approx(7 / 9) and two["difference"]["value"] == pytest.approx(7 / 9 - 1 / 2)
    assert found["ra3"]["plus_pass@k"]["1"]["difference"]["value"] == pytest.approx(1 / 6 - 1 / 3)
    assert "difference" not in found["base"]["pass@k"]["1"]
    assert (found["base"]["think"], found["ra3"]["think"]) == (None, "auto")
    assert (found["ra3"]["tokens_per_sample"], found["ra3"]["think_rate"], found["ra3"]["finished"]) == (
        20,
        0.25,
        0.75,
    )


def test_intervals_are_paired():
    """Of 40 problems base solves 20, ra3 these and 4 more. A difference is 0 or 1, its mean 0.1 with a deviation of
    sqrt(0.1 * 0.9 / 40) = 0.05; that of each mean is about 0.08."""
    a, b = [1] * 20 + [0] * 20, [1] * 24 + [0] * 16
    found = compare_runs({"base": results(a, n=1), "ra3": results(b, n=1)}, [1])
    number = found["ra3"]["pass@k"]["1"]
    assert (number["difference"]["low"], number["difference"]["high"]) == paired_interval(np.array(a), np.array(b))
    assert (number["low"], number["high"]) == share_interval(np.array(b))
    widths = [one["high"] - one["low"] for one in (number["difference"], number, found["base"]["pass@k"]["1"])]
    assert widths[0] < 0.7 * min(widths[1:]) and number["difference"]["low"] > 0


def test_problems_are_matched_by_their_ids():
    """The same results in another order: each difference is 0. None of 3 problems differs; z^2 / (3 + z^2) = 0.561."""
    base = results([0, 1, 4])
    turned = base | {"problems": dict(reversed(base["problems"].items()))}
    number = compare_runs({"base": base, "turned": turned}, [1])["turned"]["pass@k"]["1"]
    assert number["difference"] == pytest.approx({"value": 0.0, "low": -0.5615, "high": 0.5615}, abs=1e-4)


def test_plus_is_left_out_unless_all_have_it():
    found = compare_runs({"base": results([1], plus=[1]), "ra3": results([1])}, [1])
    assert all("plus_pass@k" not in model for model in found.values())


def test_which_k():
    runs = {"a": results([1], k=(1, 2, 4)), "b": results([1], k=(4, 1))}
    assert choose_ks(runs) == [1, 4] and choose_ks(runs, [3, 2]) == [2, 3]
    assert choose_ks(runs, num_samples=2) == [1] and choose_ks({}, num_samples=2) == [1]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"think": "always", "threshold": 0.5, "num_samples": 9}, []),
        (
            {"temperature": 0.2, "max_new_tokens": 8},
            ["`max_new_tokens` is 64 for a and 8, `temperature` is 0.8"],
        ),
    ],
)
def test_other_settings_are_named_but_for_thinking(other, says):
    notes = sampling_notes({"a": results([1]), "b": results([1], **other)})
    assert len(notes) == len(says) and all(text in note for text, note in zip(says, notes, strict=True))


def test_samples_from_elsewhere_are_named():
    notes = sampling_notes({"a": results([1]), "b": results([1]) | {"run": {"samples": "x.jsonl"}}})
    assert notes == [
        "b was judged from a file of samples; how they were drawn is not known.",
        "Programs of a ran under 3 s and 512 MiB, those of b under unknown limits.",
    ]


def test_other_limits_are_named():
    a, b = results([1]), results([1])
    b["run"]["limits"] = {"seconds": 10.0, "memory_mb": 512}
    assert sampling_notes({"a": a, "b": b, "c": a}) == [
        "Programs of a ran under 3 s and 512 MiB, those of b under 10 s and 512 MiB."
    ]


def test_a_task_by_another_name_is_the_same():
    a, b = results([1], tasks="f"), results([1], task="copy", tasks="f")
    match_problems([Entrant("a", "a", a, None), Entrant("b", "b", b, None)])


DAMAGES = {
    "no verdicts": {"problems": {"T/0": {}}},
    "no problems": {"problems": {}},
    "a list": {"problems": [["passed"]]},
    "a word": {"problems": {"T/0": {"verdict": "passed"}}},
    "an unknown verdict": {"problems": {"T/0": {"verdict": ["good"]}}},
    "no run": {"run": None},
    "odd settings": {"run": {"settings": 3}},
    "a number": {"pass@k": 3},
    "odd k": {"pass@k": {"one": {"value": 1.0}}},
    "no value": {"pass@k": {"1": {}}},
    "no task": {"task": 3},
    "odd means": {"think_rate": "0.5"},
    "odd counts": {"verdicts": {"passed": "1"}},
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES)
def test_damaged_results_are_named(change, capsys):
    write("a", results([1]))
    write("b", results([1]) | change)
    assert run("a", "b") == 2
    assert "results.json of 'b' is damaged" in capsys.readouterr().err


# ---- table and picture ----


def test_table_and_files(capsys, monkeypatch):
    """pass@1 of 1/4 and 1/2 on each of two problems. Wilson of two, w = z^2 / 2 = 1.921: (0.25 + w / 2) / (1 + w) -+
    sqrt(0.25 * 0.75 * w + w^2 / 4) / (1 + w) = 0.027 and 0.802. The difference is the same in both: 0.25 -+ 0.658."""
    monkeypatch.setenv("COLUMNS", "120")
    places = write("results/base-toy", results([1, 1])), write("results/a-toy", results([2, 2], think="never"))
    assert run(*places, "--names", "base", "ra3|[x]", "--output_dir", "out") == 0
    said = capsys.readouterr().out
    assert "toy: 2 problems" in said and "ra3|[x]" in said and "+0.250 [-0.408, +0.908]" in said
    page = Path("out/compare.md").read_text()
    assert "| | base | ra3&#124;&#91;x&#93; |" in page
    assert "| pass@1 | 0.250 [0.027, 0.802] | 0.500 [0.095, 0.905] |" in page
    assert "| pass@1, less the first's | - | +0.250 [-0.408, +0.908] |" in page
    assert "| tokens per sample | 20.0 | 20.0 |" in page and "| verdict passed | 2 | 4 |" in page
    assert "| --think | - | never |" in page and "cross-entropy |" not in page
    assert "Without cross-entropy: base, ra3" in page and "![Points and intervals](compare.png)" in page
    written = json.loads(Path("out/compare.json").read_text())
    assert written["version"] == 1 and written["models"]["ra3|[x]"]["pass@k"]["1"]["difference"]["value"] == 0.25


def test_names_are_the_folders():
    found = read_entrants([write("results/base-toy", results([1])), write("run2", results([1]))], None)
    assert [one.name for one in found] == ["base", "run2"]


def test_without_matplotlib_there_is_no_picture(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(write("a", results([1])), write("b", results([1])), "--no_ce", "--output_dir", "out") == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert sorted(path.name for path in Path("out").iterdir()) == ["compare.json", "compare.md"]
    assert "![" not in Path("out/compare.md").read_text()


def _share(image: np.ndarray, color: tuple[int, int, int]) -> float:
    return float((np.abs(image[..., :3].astype(int) - color).max(-1) < 12).mean())


def test_the_picture_shows_points_and_bars():
    """The first is grey, the other blue; where the difference is certain its point is filled: more blue."""
    blue, grey = (0x00, 0x72, 0xB2), (0x66, 0x66, 0x66)
    found = comparison({"base": results([0] * 20 + [1] * 20, n=1), "ra3": results([0] * 18 + [1] * 22, n=1)})
    found["models"]["base"]["cross_entropy"] = {"ce": 2.0, "ce_policy": 2.1}
    shares = []
    for low in (-0.1, 0.1):
        found["models"]["ra3"]["pass@k"]["1"]["difference"] |= {"low": low, "high": 0.2}
        plot_comparison(found, "picture.png")
        image = np.asarray(Image.open("picture.png"))
        assert 5e-4 < _share(image, grey) < 0.05 and 0.8 < _share(image, (255, 255, 255)) < 0.99
        shares.append(_share(image, blue))
    assert 5e-4 < shares[0] < shares[1] < 0.05


def test_the_picture_holds_many_models_with_odd_names(monkeypatch):
    # Ten thousand draws for each of these would take long.
    monkeypatch.setattr("ra3_trl.evaluation.compare.paired_interval", lambda *values: (0.2, 0.7))
    names = ["base", "x" * 200, "a-very-long-name-" * 5, "$\\frac$", "a_b^c", "ra3 [x]"]
    found = comparison({name: results([1, 2, 3], plus=[0, 1, 2]) for name in names}, (1, 2, 3, 4))
    plot_comparison(found, "many.png")
    plot_comparison(found | {"models": {name: found["models"][name] for name in names[:2]}}, "two.png")
    many, two = (Image.open(f"{name}.png").size for name in ("many", "two"))
    assert many[1] > 1.5 * two[1] and many[0] == two[0] < 2500
    assert len(comparison_rows(found)) == len(comparison_markdown(found, None).split("\n|---")[1].split("\n| ")) - 1


# ---- refusals ----


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    for module, name in ((door, "load_checkpoint"), (cross_entropy, "Policy"), (compare, "load_tokenizer")):
        monkeypatch.setattr(module, name, pytest.fail)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("a",), "'a' is all there is"),
        (("a", "a"), "two are called 'a'"),
        (("a", "b", "--names", "x", "x"), "two are called 'x'"),
        (("a", "b", "--names", "x"), "`names` has 1 names for 2"),
        (("a", "b", "--names", "x", "../y"), "'../y', which is no folder's name"),
        (("a", "empty"), "'empty' is a folder with neither config.json"),
        (("a", "file"), "'file' is a file"),
        (("a", "changed"), "'a' and 'changed' are of problems of the same ids with other prompts or tests"),
        (("a", "changed", "--task", "both.jsonl"), "'a' and 'changed' are of problems of the same ids"),
        (("a", "mbpp"), "'a' is of the task 'toy' and 'mbpp' of 'mbpp'"),
        (("a", "fewer"), "'fewer' has no results for 1 of the problems ('T/1'), which 'a' has"),
        (("fewer", "a"), "'fewer' has no results for 1 of the problems ('T/1')"),
        (("a", "b", "--k", "5"), "`k` is 5, but 'a' has 4 samples"),
        (("a", "b", "--k", "0"), "`k` is [0]"),
        (("a", "only2"), "no k of pass@k is common to all ('a' 1, 'only2' 2)"),
        (("a", "org/model"), "`task` is missing; the results are of 'toy'"),
        (("a", "org/model", "--task", "other.jsonl"), "'a' is of the task 'toy' and 'model' of 'other'"),
        (("a", "org/model", "--task", "toy.jsonl"), "'model' has no results for 1 of the problems ('T/1')"),
        (("org/a", "org/b", "--k", "2", "--task", "toy.jsonl"), "`k` is 2 and `num_samples` 1"),
        (("org/a", "org/b", "--task", "no.jsonl"), "no.jsonl is no file"),
        (("org/a", "org/b", "--eval_documents", "0"), "`eval_documents` is 0"),
        (("org/a", "org/b", "--batch_size", "0"), "`batch_size` is 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(nothing_is_loaded, capsys, words, says):
    for name, found in (
        ("a", results([1, 2], tasks="f")), ("changed", results([1, 2], tasks="g")), ("b", results([1, 2])),
        ("fewer", results([1])), ("only2", results([1, 2], k=(2,))),
        ("mbpp", results([1, 2], task="mbpp")),
    ):  # fmt: skip
        write(name, found)
    Path("empty").mkdir()
    Path("file").write_text("")
    row = {"task_id": "T/0", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f):\n    assert f(1)\n"}
    for name in ("toy", "other"):
        Path(f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    before = sorted(Path().rglob("*"))
    assert run(*words) == 2
    assert says in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before


# ---- checkpoints ----


TEXT = "def area(r):\n    if r < 0:\n        raise ValueError(r)\n    return 3.14 * r * r\n"


@pytest.fixture
def checkpoint(tiny_model, tokenizers):
    """`checkpoint("base", seed)`: a random model's folder."""

    def make(name: str, seed: int = 0, kind: str = "newline_indent", **settings) -> str:
        tiny_model("llama", tokenizers[kind], seed).save_pretrained(name)
        tokenizers[kind].save_pretrained(name)
        if settings:
            write_settings(settings, name)
        return name

    return make


def measure(places: list[str], *words: str) -> tuple[dict[str, dict], dict, list[str]]:
    """Numbers of each, the settings that they share, and notes."""
    options = compare._parser().parse_args([*places, "--dtype", "float32", "--max_length", "256", *words])
    checkpoints = {place: place for place in places}
    shared, notes = cross_entropy.shared_settings(options, checkpoints)
    numbers, more = cross_entropy.measure(options, shared, checkpoints, Dataset.from_dict({"text": [TEXT]}))
    return numbers, shared, notes + more


def test_cross_entropy_is_the_models(checkpoint, tiny_model, tokenizers):
    """By one plain forward: the text's tokens but the first, before which nothing stands; bits per byte likewise."""
    found, _, _ = measure([checkpoint("base")])
    tokenizer = tokenizers["newline_indent"]
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    with torch.no_grad():
        logps = tiny_model("llama", tokenizer)(ids).logits[0, :-1].log_softmax(-1)
    nats = -float(logps.gather(1, ids[0, 1:, None]).double().sum())
    size = len(TEXT.encode()) - len(tokenizer.decode(ids[0, :1]))
    assert found["base"]["code_tokens"] == ids.shape[1] - 1
    assert found["base"]["ce"] == pytest.approx(nats / (ids.shape[1] - 1), abs=1e-4)
    assert found["base"]["bits_per_byte"] == pytest.approx(nats / size / math.log(2), abs=1e-4)


def test_all_are_measured_with_the_same_settings(checkpoint):
    """base has none of its own; those of the first that was trained count, but for flags."""
    places = [checkpoint("base"), checkpoint("a", 1, horizon=2, max_latent_length=5, gate="head")]
    places.append(checkpoint("b", 2, horizon=3, max_latent_length=6, max_length=77))
    _, shared, notes = measure(places, "--max_latent_length", "4")
    assert shared == {"horizon": 2, "max_latent_length": 5}
    assert notes == ["All were measured with a's settings; b has another `horizon`."]


def test_other_tokenizers_are_named(checkpoint):
    _, _, notes = measure([checkpoint("base"), checkpoint("other", kind="newline_alone")])
    assert len(notes) == 1 and "bits per byte can" in notes[0]


def test_a_tokenizer_without_the_tags_is_named(checkpoint):
    places = [checkpoint("base"), checkpoint("ra3", action_format="tags")]
    with pytest.raises(ValueError, match="^base: `processing_class` lacks the special tokens .* set `no_ce`"):
        measure(places)


def test_held_out_rows_are_those_of_training(tmp_path):
    """Of 40 functions `ra3 train` holds out 2, one in twenty."""
    Path("code").mkdir()
    for i in range(40):
        Path("code", f"m{i}.py").write_text(f"def f{i}(x):\n    y = x + {i}\n    y = y * y\n    return y\n")
    options = compare._parser().parse_args(["a", "b", "--code_dir", "code"])
    found, source = cross_entropy.held_out_texts(options, None)
    whole = cross_entropy.load_splits(None, "code", "train")["train"]
    assert found["text"][:] == hold_out(whole, None, None, 42)[1]["text"][:] and len(found) == 2
    assert source == "of code, those that `ra3 train` holds out with seed 42"
    options = compare._parser().parse_args(["a", "b", "--code_dir", "code", "--dataset_split", "train"])
    assert len(cross_entropy.held_out_texts(options, None)[0]) == 40


@needs_bwrap
def test_from_checkpoints_to_the_picture_and_again(checkpoint, monkeypatch, tmp_path):
    """The second run draws nothing and says the same; the others take results that are there."""
    rows = [
        {"task_id": f"Toy/{name}", "prompt": f"def {name}(x):\n", "entry_point": name,
         "canonical_solution": f"    return x {rest}\n", "test": f"def check(f):\n    assert f(3) == 3 {rest}\n"}
        for name, rest in (("double", "* 2"), ("square", "** 2"))
    ]  # fmt: skip
    Path("toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("elsewhere").mkdir()
    places = [checkpoint("base"), checkpoint("elsewhere/ra3", 1)]
    words = ("--task", "toy.jsonl", "--num_samples", "2", "--k", "1,2", "--max_new_tokens", "6", "--slots", "1")
    assert run(*places, *words, "--output_dir", "out") == 0
    found = json.loads(Path("out/compare.json").read_text())
    assert list(found["models"]) == ["base", "ra3"] and found["num_tasks"] == 2
    for model in found["models"].values():
        assert set(model["pass@k"]) == {"1", "2"} and model["num_samples"] == 2
        assert model["cross_entropy"]["ce"] > 1 and model["tokens_per_sample"] <= 6
    assert found["notes"] == ["Cross-entropy is in nats per code token; documents: 2 (the tasks' own solutions)."]
    assert str(Path.cwd()) not in Path("out/compare.json").read_text() + Path("out/compare.md").read_text()
    assert Image.open("out/compare.png").size[0] > 1000
    samples = Path("out/ra3/samples.jsonl").read_bytes()
    assert samples.count(b"\n") == 4 and not Path("base/README.md").exists()

    monkeypatch.setattr(draw, "draw_completions", pytest.fail)
    assert run(*places, *words, "--output_dir", "out") == 0
    assert json.loads(Path("out/compare.json").read_text()) == found
    assert Path("out/ra3/samples.jsonl").read_bytes() == samples

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run("base", "out/ra3", *words, "--output_dir", "again") == 0
    again = json.loads(Path("again/compare.json").read_text())
    assert again["models"]["base"] == found["models"]["base"] and "cross_entropy" not in again["models"]["ra3"]
    assert "Without cross-entropy: ra3; the weights that were evaluated are not" in again["notes"][-1]
    assert not any("other settings" in note for note in again["notes"])

    assert run("out/base", "out/ra3", "--task", "toy.jsonl", "--output_dir", "third", "--no_ce") == 0
    third = json.loads(Path("third/compare.json").read_text())
    assert third["notes"] == [] and third["models"]["ra3"]["pass@k"] == found["models"]["ra3"]["pass@k"]
