"""The stages of `benchmarks/gpu`: what they run, how they end in time and go on, what is put together."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import replace

import pytest
from conftest import needs_bwrap

from benchmarks.gpu import drive as module
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.domain import PREPARED, PROMPTS, TRAIN, write_data
from benchmarks.gpu.drive import State, collect, drive, stages
from benchmarks.gpu.evidence import BENCHMARKS, SUITES
from benchmarks.gpu.plan import ARMS, EVALUATED, OURS, PRESETS, Stage, fitted
from ra3_trl.cli import compare, rlvr, train


FITTED = {name: fitted(preset, "some/model", "code", "mbpp.jsonl") for name, preset in PRESETS.items()}
FITTED["toy"] = replace(FITTED["toy"], tasks=("tasks.jsonl",), rlvr={**FITTED["toy"].rlvr, "task": "tasks.jsonl"})


def trained(folder, arm, evaluation, seed=0):
    """What a trained arm leaves: the seconds of its evaluation."""
    place = folder / f"seed-{seed}" / arm
    place.mkdir(parents=True)
    (place / EVALUATED).write_text(json.dumps({"eval_runtime": evaluation}))


def plan(folder, preset):
    """All stages, were each to take a second, and hindsight three."""
    state = State(folder)
    for seed in preset.seeds:
        for arm in ("ntp", "ra3", "hindsight"):
            state.seconds[f"{arm}-{seed}"] = 4.0 if arm == "hindsight" else 2.0
            trained(folder, arm, 1.0, seed)
    return list(stages(folder, preset, state))


@pytest.mark.parametrize("name", PRESETS)
def test_every_command_is_understood(name, tmp_path):
    """By the parser of its command; what is meant is what is read."""
    preset = FITTED[name]
    found = plan(tmp_path, preset)
    assert len({stage.name for stage in found}) == len({stage.done for stage in found}) == len(found)
    for stage in found:
        if stage.words[1] != "ra3_trl.cli.main":
            assert stage.words[1] == "benchmarks.gpu.measure"
            continue
        command, *words = stage.words[2:]
        if "--bf16" in words:  # refused where there is no GPU
            words[words.index("--bf16") + 1] = "false"
        if command == "train":
            _, args, model, _ = train.make_parser().parse_args_and_config(words)
            assert model.model_name_or_path == "some/model" and args.output_dir == str(stage.output)
            ours, times = stage.name.startswith(OURS), 3 if stage.name.startswith("ra3_compute") else 1
            assert args.e_steps == preset.e_steps * times * ours
            assert args.e_steps + args.m_steps == preset.updates * times
            assert (args.proposal != "causal") == stage.name.startswith("hindsight")
            assert args.use_cpu is (name != "h100") and stage.stop == signal.SIGTERM
        elif command == "rlvr":
            script, args, model = rlvr.make_parser().parse_args_and_config(words)
            assert script.task_file == ("mbpp.jsonl" if script.task == "mbpp" else script.task_file)
            assert args.max_steps == preset.rlvr["max_steps"] and model.model_name_or_path
        else:
            options = compare._parser().parse_args(words)
            assert options.task in preset.tasks and options.no_ce and len(options.names) == len(options.places)
            assert (options.task_file is not None) == (options.task == "mbpp")


def test_arms_get_as_much_time(tmp_path):
    """RA3 took 30 seconds and next-token prediction 10, of which 5 and 5 are evaluation: 4 updates in 5 seconds are 20
    in 25. Hindsight took 55, 50 without evaluation: RA3's 4 in 25 are 8."""
    state = State(tmp_path)
    state.seconds = {"ra3-0": 30.0, "ntp-0": 10.0, "hindsight-0": 55.0}
    for arm in ("ra3", "ntp", "hindsight"):
        trained(tmp_path, arm, 5.0)
    assert state.matched_updates(PRESETS["toy"], "ntp_compute", 0) == 20
    assert state.matched_updates(PRESETS["toy"], "ra3_compute", 0) == 8
    state.seconds["ra3-0"] = 99.0
    again = State(tmp_path)
    assert again.matched_updates(PRESETS["toy"], "ntp_compute", 0) == 20  # decided once, also for a later call


def script(name, folder, body, **settings):
    done = folder / f"{name}.done"
    return Stage(
        name, ("-c", f"import sys, time, pathlib\ndone = pathlib.Path({str(done)!r})\n{body}"), done, **settings
    )


@pytest.fixture
def plan_of(monkeypatch):
    def make(*found):
        monkeypatch.setattr(module, "stages", lambda folder, preset, state: iter(found))
        monkeypatch.setattr(module, "GRACE", 5.0)

    return make


def test_a_stage_out_of_time_is_asked_to_end_and_goes_on(tmp_path, plan_of):
    """The first call ends the stage by its signal; the second resumes from its checkpoint, and the third has nothing
    to do."""
    body = (
        "import signal\nlast = pathlib.Path(done.parent, 'out', 'checkpoint-3')\n"
        "def save(*_):\n last.mkdir(parents=True); (last / 'trainer_state.json').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "if sys.argv[1:] == ['--resume_from_checkpoint', str(last)]: done.touch()\n"
        "else: time.sleep(60)"
    )
    slow = script("slow", tmp_path, body, output=tmp_path / "out", stop=signal.SIGTERM)
    plan_of(script("quick", tmp_path, "done.touch()"), slow)
    begin = time.monotonic()
    assert not drive(tmp_path, None, 7.0) and time.monotonic() - begin < 12
    seconds = State(tmp_path).seconds
    assert (tmp_path / "quick.done").exists() and seconds["slow"] > 0.5
    assert drive(tmp_path, None, 60.0)
    after = State(tmp_path).seconds
    assert after["slow"] > seconds["slow"] and after["quick"] == seconds["quick"]
    assert drive(tmp_path, None, 60.0) and State(tmp_path).seconds == after


def test_seconds_are_counted_as_they_pass(tmp_path, plan_of, monkeypatch):
    """A call that is killed has lost none but the last few: the stage finds its own while it runs."""
    monkeypatch.setattr(module, "COUNT", 0.2)
    state = tmp_path / "state.json"
    body = (
        f"import json\nstate, end = pathlib.Path({str(state)!r}), time.monotonic() + 30\n"
        "while not state.exists() and time.monotonic() < end: time.sleep(0.05)\n"
        "done.write_text(str(json.loads(state.read_text())['seconds']['slow']))"
    )
    plan_of(script("slow", tmp_path, body))
    assert drive(tmp_path, None, 60.0)
    assert 0.2 <= float((tmp_path / "slow.done").read_text()) < State(tmp_path).seconds["slow"]


def test_a_stage_that_fails_is_told_of(tmp_path, plan_of):
    plan_of(script("bad", tmp_path, "print('what went wrong'); sys.exit(2)"))
    with pytest.raises(RuntimeError, match=r"bad failed with exit code 2; .*bad.log ends with:\n.*what went wrong"):
        drive(tmp_path, None, 60.0)


def test_what_is_put_together(tmp_path):
    """Differences are paired by seed: -0.1 and -0.3 have the mean -0.2."""
    preset = replace(PRESETS["cpu"], seeds=(0, 1, 2))
    names = ("ce", "ce_never", "elbo", "bound_multi", "think_rate", "gain")
    for seed, (ntp, ra3) in enumerate([(1.0, 0.9), (2.0, 1.7)]):
        (tmp_path / f"seed-{seed}").mkdir()
        for arm, value in zip(ARMS, (3.0, ntp, ntp, ra3, ra3, ra3), strict=True):
            sums = [
                {"tokens": 10, **dict.fromkeys(("log_likelihood", "never", "elbo", "multi_sample"), -8 * value)},
                {"tokens": 30, **dict.fromkeys(("log_likelihood", "never", "elbo", "multi_sample"), -32 * value)},
            ]
            (tmp_path / f"seed-{seed}" / f"{arm}-measures.json").write_text(
                json.dumps({f"eval_{name}": value for name in names} | {"sums": sums})
            )
    (tmp_path / "rlvr-ra3").mkdir()
    log = [{"step": 1, "reward": 0.25}, {"step": 2, "reward": 0.5}, {"train_loss": 0.0}]
    (tmp_path / "rlvr-ra3" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    found = collect(tmp_path, preset)
    assert found["ce"]["ntp"]["values"] == (1.0, 2.0)  # the third seed is not done
    assert found["ce"]["ra3 less ntp"]["mean"] == pytest.approx(-0.2)
    # By document, in tokens of 20 on average: 8 and 32 times -0.1 and -0.3 over 20, in all (8 + 32) / 20 / 2 * -0.2.
    rows = found["elbo_by_document"]["ra3 less ntp"]
    assert rows["values"] == pytest.approx((-0.04, -0.16, -0.12, -0.48)) and rows["mean"] == pytest.approx(-0.2)
    assert found["elbo_by_document"]["hindsight less ra3"]["mean"] == 0
    assert found["rlvr-ra3"] == [0.25, 0.5] and "rlvr-base" not in found
    assert collect(tmp_path / "new", preset)["seconds"] == {}


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("corpus", ["traces", "mbpp"])
def test_every_command_of_the_evidence_is_understood(suite, corpus, tmp_path):
    """By the parser of its command; next-token prediction gets RA3's compute: twice its seconds, twice the updates."""
    files = {name: f"{name}.jsonl" for name in BENCHMARKS}
    preset = replace(SUITES[suite][corpus], model="some/model", grpo=True, files=files)
    state = State(tmp_path)
    state.seconds = {"ntp-0": 3.0, "ra3-0": 5.0}
    for arm in ("ntp", "ra3"):
        trained(tmp_path, arm, 1.0)
    found = {stage.name: stage for stage in stages(tmp_path, preset, state)}
    without = [stage.name for stage in stages(tmp_path, replace(preset, grpo=False), state)]
    assert list(found)[: len(without)] == without  # the second call goes on where the first ended
    assert {name for name in found if name.startswith("rlvr")} == {"rlvr-ntp_compute", "rlvr-ra3"}
    assert len({stage.done for stage in found.values()}) == len(found)
    base = str(tmp_path / "prepared") if corpus == "traces" else "some/model"
    for name, stage in found.items():
        if stage.words[1] == "benchmarks.gpu.domain":
            continue
        command, *words = stage.words[2:]
        if "--bf16" in words:  # refused where there is no GPU
            words[words.index("--bf16") + 1] = "false"
        if command == "train":
            _, args, model, _ = train.make_parser().parse_args_and_config(words)
            assert model.model_name_or_path == ("some/model" if name == "prepared" else base)
            updates = preset.prepare if name == "prepared" else preset.updates * (2 if "compute" in name else 1)
            assert args.e_steps + args.m_steps == updates and bool(args.e_steps) == name.startswith("ra3")
            assert args.existing_comments == "keep" or name != "prepared"  # they are what it learns
        elif command == "rlvr":
            script, _, model = rlvr.make_parser().parse_args_and_config(words)
            assert model.model_name_or_path.endswith(name.removeprefix("rlvr-"))
            assert script.task_file == ("mbpp.jsonl" if corpus == "mbpp" else None)
        else:
            options = compare._parser().parse_args(words)
            assert options.task_file == f"{options.task}.jsonl" and options.max_tasks is None
            assert (options.num_samples, options.k) == ((1, "1") if "greedy" in name else (5, "1,5"))
    compared = {name for name in found if name.startswith("compare")}
    assert len(compared) == (8 if corpus == "mbpp" else 0)  # two benchmarks, two ways, before and after GRPO


def test_the_data_of_the_evidence(tmp_path):
    """Programs with traces to prepare with, without to train on, and prompts that end before an assertion."""
    write_data("traces", "0", "30", str(tmp_path))
    rows = {name: [json.loads(row) for row in (tmp_path / name).open()] for name in (PREPARED, TRAIN, PROMPTS)}
    assert [len(rows[name]) for name in rows] == [30, 30, 30]
    assert sum("\n# " in row["text"] for row in rows[PREPARED]) > 10
    assert not any("#" in row["text"] for row in rows[TRAIN])
    assert all(set(row) == {"prompt", "program", "opening"} and "assert" not in row["prompt"] for row in rows[PROMPTS])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_bwrap
def test_the_evidence_at_toy_size(tmp_path, tiny_model, tokenizers, capsys):
    """Some six minutes: the first call without GRPO, the second with it, from the command's entry point."""
    tokenizer = tokenizers["newline_indent"]
    tiny_model("llama", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code = "def f{i}(n):\n    a = n + {i}\n    b = a * 2\n    return b - 1"
    mbpp, humaneval = tmp_path / "mbpp.jsonl", tmp_path / "humaneval.jsonl"
    rows = [
        {"task_id": task_id, "text": "Add.", "code": code.replace("{i}", str(i)), "test_setup_code": "",
         "test_list": [f"assert f{i}({n}) == {2 * (n + i) - 1}" for n in (1, 2)], "challenge_test_list": []}
        for i, task_id in enumerate((11, 12, *range(601, 609)))
    ]  # fmt: skip
    mbpp.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test = "def check(c):\n    assert c(1) == 2\n"
    task = {"task_id": "t/0", "prompt": "def f(x):\n", "entry_point": "f", "test": test}
    humaneval.write_text(json.dumps(task) + "\n")
    words = [str(tmp_path / "run"), "--preset", "evidence_toy", "--model", str(tmp_path / "model"), "--json"]
    words += ["--mbpp", str(mbpp), "--humaneval", str(humaneval), "--seconds", "900"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"traces", "mbpp"} and not any("rlvr" in name for one in found.values() for name in one)
    for corpus in found.values():
        assert set(corpus["measures"]) == {"base", "ntp", "ntp_compute", "ra3"}
        assert corpus["updates"]["ntp_compute-0"] >= 2
    assert {"think_there", "bound_multi", "right"} <= set(found["traces"]["measures"]["ra3"])
    for name in BENCHMARKS:
        assert set(found["mbpp"][f"compare-{name}-sampled"]["models"]) == {"base", "ntp_compute", "ra3"}
    assert main([*words, "--grpo"]) == 0
    found = json.loads(capsys.readouterr().out)
    for corpus in found.values():
        assert all(len(corpus[f"rlvr-{arm}"]) == 2 for arm in ("ntp_compute", "ra3"))
        assert set(corpus["measures-grpo"]) == {"ntp_compute-grpo", "ra3-grpo"}
    assert "compare-mbpp-greedy-grpo" in found["mbpp"]


@pytest.mark.slow
@needs_bwrap
def test_all_stages_at_toy_size(tmp_path, tiny_model, tokenizers):
    """Some three minutes, most of it imports: every stage in a process of its own, in calls that are cut short."""
    tiny_model("llama", tokenizers["newline_indent"]).save_pretrained(tmp_path / "model")
    tokenizers["newline_indent"].save_pretrained(tmp_path / "model")
    (tmp_path / "code").mkdir()
    for i in range(6):
        (tmp_path / "code" / f"m{i}.py").write_text(
            f"def f{i}(x):\n    y = x + {i}\n    if y > {i}:\n        return y\n    return x\n\n\n"
            f"def g{i}(x):\n    z = x\n    z += {i}\n    return z\n"
        )
    test = "def check(c):\n    assert c(1) == 2\n"
    rows = [{"task_id": f"t/{i}", "prompt": "def f(x):\n", "entry_point": "f", "test": test} for i in range(3)]
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    preset = fitted(PRESETS["toy"], str(tmp_path / "model"), str(tmp_path / "code"), None)
    preset = replace(preset, tasks=(str(tasks),), rlvr={**preset.rlvr, "task": str(tasks)})
    folder, calls = tmp_path / "run", 1
    while not drive(folder, preset, 180.0):
        calls += 1
    assert calls < 10
    found = collect(folder, preset)
    assert set(found["ce"]) >= set(ARMS) and all(one["n"] == 1 for one in found["ce"].values())
    assert found["ce"]["ntp"] != found["ce"]["base"]
    assert set(found["compare-tasks"]["models"]) == set(ARMS)
    assert set(found["compare-tasks-grpo"]["models"]) == {"base-grpo", "ntp-grpo", "ra3-grpo"}
    assert all(len(found[f"rlvr-{arm}"]) == 2 for arm in ("base", "ntp", "ra3"))
    assert sys.modules[drive.__module__].State(folder).updates["ntp_compute-0"] >= 4


def test_proposals_that_the_model_cannot_make_are_refused_at_once(tmp_path, tokenizers, capsys):
    """Not after three arms have been trained."""
    tokenizers["newline_indent"].save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "run"), "--preset", "h100", "--model", str(tmp_path / "model")]
    with pytest.raises(SystemExit):
        main(words)
    assert "has no tokens for filling in the middle" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
