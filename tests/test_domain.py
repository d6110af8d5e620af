"""The replication's domain `traces`: programs of several kinds, arms on real checkpoints, its table, a toy run."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import needs_bwrap

from benchmarks import replication
from benchmarks.__main__ import main
from benchmarks.picture import ResultTable, of_bases, read_table, table_section
from benchmarks.replication import domain_measure
from benchmarks.replication.assertion import assertion_reward, is_right, stated_value
from benchmarks.replication.cold_data import ColdTask, hold
from benchmarks.replication.cold_measure import ColdMeasureRecipe
from benchmarks.replication.domain import (
    ARMS,
    MAIN,
    UPDATES,
    DomainForm,
    best_level,
    chosen,
    latents_drawn,
    of_arm,
    plan,
    run_domain,
    starts,
    table,
    traces_form,
)
from benchmarks.replication.domain_measure import DomainMeasures, DomainRecipe, TraceBoundRecipe
from benchmarks.replication.real import on_base
from benchmarks.replication.real_gate import ABLATIONS
from benchmarks.replication.records import (
    KINDS,
    Curve,
    KindCorpus,
    PreparedRecipe,
    TraceCorpus,
    TraceMeasureRecipe,
    TraceMeasures,
    TraceMidRecipe,
)
from benchmarks.replication.rlvr import TraceRlvrRecipe, reinforce_traces, trace_prompts
from benchmarks.replication.store import Store, recipe_hash
from benchmarks.replication.table import ArmResult
from benchmarks.replication.traces import programs, tasks
from ra3_trl.testbed.corpus import content_hash


pytestmark = pytest.mark.usefixtures("quiet")
ALL = KindCorpus(kinds=KINDS)
NUMBERS = (
    0.5,
    0.02,
    0.6,
    1.0,
    0.7,
    0.9,
    1.0,
    1.1,
    1.05,
    0.6,
    0.7,
    0.1,
)  # those of `DomainMeasures` that are always there


# ---- programs of several kinds ----


def _traced(prompt: str) -> tuple[str, object]:
    """The trace and the value, by Python alone: behind every change of a variable it is printed."""
    rows = []
    for row in prompt.splitlines():
        rows.append(row)
        if row.startswith("    ") and (" = " in row or ".append(" in row):
            name = row.split()[0].partition(".")[0]
            rows.append(f"{row[: len(row) - len(row.lstrip())]}print('{name} =', repr({name}))")
    said, names = io.StringIO(), {}
    with contextlib.redirect_stdout(said):
        exec("\n".join(rows), names)
    return "# " + ", ".join(said.getvalue().splitlines()), names["result"]


@pytest.mark.parametrize("kind", KINDS)
def test_traces_and_values_are_what_python_computes(kind):
    found = tasks(4, 200, KindCorpus(kinds=(kind,)))
    for one in found:
        assert (one.trace, one.value) == _traced(one.prompt)
        assert one.trace.count(" = ") == 3 and one.prompt.count("def ") == 1
    assert len({one.prompt for one in found}) > 190


def test_programs_are_of_the_kinds_that_they_are_named_after():
    """What issue O names: `s[::-1]`, `upper`, slices; `sorted`, `append`, sums; conditionals."""
    texts = {kind: "".join(one.prompt for one in tasks(5, 200, KindCorpus(kinds=(kind,)))) for kind in KINDS}
    for kind, signs in {
        "strings": ("[::-1]", ".upper()", "[1:]"),
        "lists": ("sorted(", ".append(", "sum("),
        "conditionals": ("if ", "else:"),
        "integers": (" % ",),
    }.items():
        assert all(sign in texts[kind] for sign in signs)
    assert not any(sign in texts["integers"] for sign in ("if ", "[", "'"))


@pytest.mark.parametrize("corpus", [ALL, replace(ALL, traced=1.0, right=0.0, useless=1.0)])
def test_every_program_runs_and_is_true(corpus):
    for text in programs(corpus, 3, 200)["text"]:
        exec(compile(text, "program", "exec"), {})


def test_comments_are_as_often_right_as_the_corpus_says():
    """1,000 programs, of each kind a quarter (standard deviation 14); 600 traces (15), 570 of them right (5)."""
    counts: Counter[str] = Counter()
    for text in programs(replace(ALL, traced=0.6, right=0.95), 7, 1000)["text"]:
        *rows, _ = text.splitlines()
        counts["strings"] += "('" in rows[-1 - rows[-1].startswith("#")]
        if rows[-1].startswith("#"):
            counts["traces"] += 1
            counts["right"] += rows[-1] == _traced("\n".join(rows[:-1]))[0]
    assert counts["strings"] == pytest.approx(250, abs=50) and counts["traces"] == pytest.approx(600, abs=55)
    assert counts["right"] / counts["traces"] == pytest.approx(0.95, abs=0.03)


def test_data_are_frozen():
    assert content_hash(programs(replace(ALL, traced=0.6, right=0.9, useless=0.2), 1, 50)) == "386655f26bc4e2af"


def test_half_of_the_kinds_is_seen_by_no_training():
    form = traces_form("kinds")
    seen = {kind for recipe in (*form.bases.values(), form.ntp, form.ra3) for kind in recipe.corpus.kinds}
    kept = {kind for one in form.measures.transfer for kind in one.kinds}
    assert len(seen) == len(kept) == 2 and seen | kept == set(KINDS)
    assert form.measures.measure.kinds == tuple(form.ntp.corpus.kinds) == tuple(form.rlvr.corpus.kinds)
    plain = traces_form().measures
    assert plain.measure.kinds == ("integers",)
    assert [kind for one in plain.transfer for kind in one.kinds] == list(KINDS[1:])


# ---- what was written ----


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("# s = 'a'\nassert result == 'ba'\nassert result == 'c'", "'ba'"),
        ("assert result == [1, 2]  # so\n", "[1, 2]  # so"),
        ("print(1)\n", None),
        ("    assert result == 1\n", None),
    ],
)
def test_the_first_assertion_counts(written, value):
    assert stated_value(written) == value


def test_values_are_compared_with_their_types():
    assert is_right("assert result == [1,2] # so", "[1, 2]") and is_right('assert result == "ba"', "'ba'")
    assert not is_right("assert result == 1.0", "1") and not is_right("assert result == True", "1")
    assert not is_right("assert result == '1'", "1") and not is_right("assert result == result", "1")


@needs_bwrap
def test_the_sandbox_judges_assertions():
    """The program's result is 6. What holds whatever the result is earns nothing."""
    program = "def mix(x):\n    return x + 2\n\nresult = mix(4)\n"
    written = {
        "# x = 6\nassert result == 6\n": 1.0,
        "assert result == 7\nassert result == 6\n": 0.0,
        "assert result == result\n": 0.0,
        "assert result == 6 or True\n": 0.0,
        "result = 7\nassert result == 7\n": 0.0,
        "print('no')\n": 0.0,
    }
    reward = assertion_reward(list(written), program=[program] * 6, opening=[""] * 6)
    assert asyncio.run(reward) == list(written.values())
    assert asyncio.run(assertion_reward([" x = 6\nassert result == 6"], program=[program], opening=["#"])) == [1.0]


@needs_bwrap
def test_values_that_do_not_hold_are_no_tasks():
    code = "def f(n):\n    return n + 1\n\nresult = f(1)\n"
    assert hold([ColdTask(code, "2"), ColdTask(code, "3"), ColdTask("result = f(\n", "3")]) == [True, False, False]


def test_prompts_of_grpo_are_other_programs():
    recipe = TraceRlvrRecipe(PreparedRecipe(), 0, forced=True, steps=2, prompts=3)
    rows = trace_prompts(recipe)
    assert len(rows) == 6 and all(row["prompt"] == row["program"] + "#" for row in rows)
    assert trace_prompts(replace(recipe, forced=False))["prompt"] == rows["program"]
    trained = {text.partition("assert")[0] for text in programs(TraceCorpus(), 2, 2000)["text"]}
    assert not trained & set(rows["program"])


# ---- arms and stages ----


def test_what_real_gate_has_is_not_done_again():
    """Names of entries in caches of before; and new fields at their defaults change none."""
    form = traces_form()
    steps = {name: base.steps for name, base in form.bases.items()}
    assert steps == UPDATES == {"weak": 300, "middling": 500, "strong": 800}
    strong = form.bases["strong"]
    assert strong == PreparedRecipe() and recipe_hash(strong) == "2a5e2cc3cc15"
    assert recipe_hash(on_base(form.ntp, strong, 0)) == "bf6cb41ce408"
    assert recipe_hash(replace(form.measures.measure, start=strong)) == "da0e0a3b370d"
    assert recipe_hash(replace(form.measures.measure, start=on_base(form.ntp, strong, 0))) == "453ccbfd81ca"
    assert traces_form(model="folder").bases["weak"].model == "folder" and strong.model is None
    assert len({recipe_hash(base) for base in (*form.bases.values(), *traces_form("kinds").bases.values())}) == 6


def test_the_arms():
    form = traces_form()
    found = starts(form, form.bases["weak"], 3)
    assert tuple(found) == ARMS and found["base"] is form.bases["weak"]
    assert found["ntp"] == found["ntp_forced"] and (found["ntp"].e_steps, found["ntp"].defaults) == (0, ())
    ra3, resample = found["ra3"], found["resample"]
    assert ra3.e_steps and ra3.settings == () and ra3.defaults and ra3.seed == 3
    assert (resample.e_steps, resample.m_steps) == (0, ra3.e_steps + ra3.m_steps)
    assert resample == on_base(replace(form.ra3, **ABLATIONS["no_e_phase"]), form.bases["weak"], 3)
    more = found["ntp_compute"]
    assert more.m_steps == form.compute_updates and more.programs >= more.m_steps * more.batch_size
    rows = {"gate_head": "gate", "horizon_1": "horizon", "no_penalty": "penalty", "penalty_1": "penalty"}
    changed = starts(chosen(form, arms=["base", *rows, "shorter_latents"]), form.bases["weak"], 0)
    assert {arm: dict(changed[arm].settings).keys() for arm in rows} == {arm: {name} for arm, name in rows.items()}
    assert changed["shorter_latents"].max_latent_length < ra3.max_latent_length


def test_only_some_arms_transfer_and_learn():
    form = traces_form()
    assert of_arm(form, "ntp_tokens").rlvr is None and of_arm(form, "ntp_tokens").measures.transfer == ()
    assert of_arm(form, "resample").measures.mbpp is None and of_arm(form, "resample").rlvr is not None
    assert all(of_arm(form, arm).measures.transfer for arm in MAIN) and of_arm(form, "ra3").measures.mbpp is not None


def test_names_that_there_are_none_of_are_refused():
    with pytest.raises(ValueError, match="`--base` is 'good'; choose of weak, middling, strong"):
        chosen(traces_form(), bases=["good"])
    with pytest.raises(ValueError, match="`--bases` are not of `--domain traces`"):
        main(["replication", "--domain", "traces", "--plan", "--bases", "2"])
    form = chosen(traces_form(), ["strong"], ["base", "ra3"], [])
    assert list(form.bases) == ["strong"] and form.arms == ("base", "ra3") and form.rlvr is None
    assert form.measures.transfer == () and form.measures.mbpp is None


def test_the_plan_names_each_entry_once(tmp_path, capsys):
    words = ["replication", "--domain", "traces", "--cache", str(tmp_path), "--plan", "--json", "--base", "strong"]
    store = Store(tmp_path)
    store.get(PreparedRecipe(), lambda folder: {})
    main([*words, "--arms", "base", "ntp", "ntp_forced", "--parts", "rlvr"])
    found = json.loads(capsys.readouterr().out)
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == [
        "strong: preparation", "strong, seed 0, base: measures", "strong, seed 0, base: bounds",
        "strong, seed 0, base: GRPO", "strong, seed 0, ntp: training", "strong, seed 0, ntp: measures",
        "strong, seed 0, ntp: bounds", "strong, seed 0, ntp: GRPO", "strong, seed 0, ntp_forced: GRPO",
    ]  # fmt: skip
    assert len({stage["entry"] for stage in stages.values()}) == len(stages)
    assert [name for name, stage in stages.items() if stage["done"]] == ["strong: preparation"]
    assert found["minutes_left"] == pytest.approx(sum(s["minutes"] for s in stages.values() if not s["done"]))
    # One seed of all arms on one base: three hours where cores with AMX are three times as fast (1.7 to 3 were seen).
    form = traces_form()
    assert sum(s.minutes for s in plan(store, chosen(form, ["strong"]), 1) if not s.done) < 3 * 180


# ---- the table ----


def result(accuracy: float, curve: tuple[float, ...] | None, **changes: float) -> ArmResult:
    measures = replace(DomainMeasures(*NUMBERS), accuracy=accuracy, **changes)
    return ArmResult(measures, None if curve is None else Curve(curve, 10), [], 1.0)


def run(ntp: float, ra3: float) -> dict:
    """The best level is 0.9, of RA3; 80 % of it 0.72: base after 2 updates ((0.7 + 0.8) / 2), RA3 at once."""
    arms = {
        "base": result(0.6, (0.3, 0.5, 0.7, 0.8)), "ntp": result(ntp, (0.1, 0.1, 0.1, 0.1)),
        "ra3": result(ra3, (0.8, 0.8, 0.9, 0.9), think_hard=0.9), "ntp_tokens": result(0.1, None),
    }  # fmt: skip
    return {arm: (found, {"drawn": 48 if arm == "ra3" else 0}) for arm, found in arms.items()}


def test_levels_are_shares_of_the_best():
    found = table(traces_form(), [run(0.1, 0.9), run(0.2, 0.7)])
    assert best_level({arm: one for arm, (one, _) in run(0.1, 0.9).items()}) == 0.9
    assert found["rlvr_best"]["mean"] == pytest.approx(0.9)
    assert best_level({"ra3": result(0.1, (0.2, 0.6, 0.4))}) == pytest.approx(0.5)  # of two neighbours, not the peak
    steps, drawn = found["rlvr_steps_to_80"], found["rlvr_samples_to_80"]
    assert {arm: row["mean"] for arm, row in steps.items()} == {"base": 2, "ntp": None, "ra3": 0, "ntp_tokens": None}
    assert (drawn["base"]["mean"], drawn["ra3"]["mean"]) == (20, 48)  # 10 an update; RA3 drew 48 latents before
    assert found["rlvr_steps_to_50"]["base"]["mean"] == 1  # half is 0.45: (0.5 + 0.7) / 2, not (0.3 + 0.5) / 2
    assert found["rlvr_last"]["ntp_tokens"]["n"] == 0 and found["mbpp_gain"]["ra3"]["mean"] is None
    assert found["accuracy"]["ra3"]["mean"] == pytest.approx(0.8) and len(found["runs"]) == 2


def test_where_nothing_was_learned_no_arm_is_at_a_level():
    """80 % of 0 is not reached at once."""
    one = {arm: (result(0.1, (0.0, 0.0)), {"drawn": 0}) for arm in ("base", "ntp", "ra3")}
    found = table(traces_form(), [one])
    assert found["rlvr_best"]["mean"] == 0
    assert all(found[f"rlvr_{what}_to_80"][arm]["n"] == 0 for what in ("steps", "samples") for arm in one)
    assert found["wanted"]["rlvr_steps_ratio"]["reached"] is None


def test_what_is_wanted_is_said_with_what_was_reached():
    """RA3 .9 and .7 against ntp .1 and .2: .8 and .5 more. Base .6 twice: .3 and .1 more, .2 on average."""
    wanted = table(traces_form(), [run(0.1, 0.9), run(0.2, 0.7)])["wanted"]
    above = wanted["accuracy_above_ntp"]
    assert (above["mean"], above["at_least"], above["reached"]) == (pytest.approx(0.65), 0.5, True)
    assert above["apart"] is False  # t(1) = 12.7: the intervals are wide
    assert wanted["accuracy_above_base"]["mean"] == pytest.approx(0.2) and "accuracy_above_ntp_forced" not in wanted
    assert wanted["think_hard"]["reached"] and wanted["think_easy"] | {"at_most": 0.1} == wanted["think_easy"]
    assert wanted["rlvr_steps_ratio"]["mean"] == 0 and wanted["rlvr_steps_ratio"]["reached"]
    late = run(0.1, 0.9)
    late["ra3"] = (result(0.9, (0.1, 0.1, 0.1, 0.1)), {"drawn": 0})  # the best is the base's .75 then
    assert table(traces_form(), [late])["wanted"]["rlvr_steps_ratio"]["reached"] is False
    alone = table(traces_form(), [run(0.5, 0.9)])["wanted"]["accuracy_above_ntp"]
    assert (alone["apart"], alone["reached"]) == (None, False)


def test_told_to_think_is_the_same_weights():
    found = replace(DomainMeasures(*NUMBERS), transfer_accuracy=0.1, transfer_forced=0.2, transfer_thinks=0.0)
    forced = found.told_to_think()
    assert (forced.think_hard, forced.accuracy, forced.comment_right, forced.ce) == (1.0, 0.7, 0.6, 1.0)
    assert (forced.transfer_accuracy, forced.transfer_thinks, forced.mbpp_right) == (0.2, 1.0, None)


def test_transfer_is_a_mean_over_kinds(monkeypatch, tmp_path):
    """Of each number its own: right .2, told to think .4, told not to .1 and 0, drawn comments right .6, thinks .8."""

    def told(_, recipe):
        more = 0.1 * recipe.task_seed
        return TraceMeasures(0.1 + more, 0.7 + more, 0.0, 0.3 + more, more, 1.0, 0.5 + more, 0.9, 0.0, {}, [])

    monkeypatch.setattr(domain_measure, "measure", told)
    monkeypatch.setattr(domain_measure, "bounds", lambda *_: {"bound_multi": 0.5, "elbo": 0.6, "ce": 0.7})
    form = traces_form()
    asked = form.measures.measure
    recipe = replace(form.measures, transfer=(replace(asked, task_seed=0), replace(asked, task_seed=2)), mbpp=None)
    found, about = domain_measure.measure_domain(Store(tmp_path), recipe, PreparedRecipe())
    names = ("accuracy", "forced", "never", "comment_right", "thinks")
    assert [getattr(found, f"transfer_{name}") for name in names] == pytest.approx([0.2, 0.4, 0.1, 0.6, 0.8])
    assert found.mbpp_right is None and [one["accuracy"] for one in about["transfer"]] == pytest.approx([0.1, 0.3])


def test_latents_are_counted_by_the_log():
    """8 programs of 6 boundaries, 8 latents: 384 if all are tried; a third and a half of them, and 3 M-updates."""
    form = traces_form()
    recipe = on_base(replace(form.ra3, e_steps=2, m_steps=3, settings=(("num_latents", 8),)), PreparedRecipe(), 0)
    log = [
        {"data/boundaries": 12000.0, "data/documents": 2000.0, "estep/tried_rate": 1 / 3}, {"estep/tried_rate": 0.5},
        {"loss": 1.0},
    ]  # fmt: skip
    assert latents_drawn(recipe, log) == 128 + 192 + 3 * 384
    assert latents_drawn(on_base(form.ntp, PreparedRecipe(), 0), log) == latents_drawn(PreparedRecipe(), []) == 0


def test_a_table_for_each_base_is_drawn(tmp_path):
    rows = table(traces_form(), [run(0.1, 0.9), run(0.2, 0.7)])
    told = {"seed": 0, "passed": True, "comment_right": 0.5}
    tables = {
        "strong": {"bases": [told], "seeds": 2, "domain": "traces", **rows},
        "weak": {"bases": [told], "seeds": 2},
    }
    path = tmp_path / "traces.json"
    path.write_text(json.dumps({"domain": "traces", "seeds": 2, "form": {}, "tables": tables}))
    (found,) = of_bases([read_table(str(path), "x")])
    assert isinstance(found, ResultTable) and found.label == "x strong"
    section = table_section(found)
    assert section.title == "Domain traces: x strong"
    assert dict(section.rows)["hard lines right"][2][0] == "0.800"
    # NTP's two runs of GRPO never get there; from `ntp_tokens` there is none.
    assert dict(section.rows)["GRPO updates to 80 %"][1::2] == [("\u2013", "(2 never)"), ("\u2013", "")]
    assert [line.label for line in section.charts[-1].series] == ["base", "ntp", "ra3"]  # who learned by GRPO


# ---- runs ----


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_model, tokenizers) -> str:
    """A tiny random model in the place of SmolLM2."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = copy.deepcopy(tokenizers["newline_indent"])
    tiny_model("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def toy(model: str, mbpp: str | None) -> DomainForm:
    """Everything once, as small as can be; half of the kinds are trained on."""
    corpus = KindCorpus()
    base = PreparedRecipe(model, steps=2, batch_size=2, corpus=replace(corpus, traced=0.5))
    ntp = TraceMidRecipe(base, 0, m_steps=2, batch_size=2, programs=8, max_latent_length=3, corpus=corpus)
    small = {"tasks": 2, "drawn": 2, "comment_tokens": 3, "tokens": 4}
    cold = ColdMeasureRecipe(tasks=1, draws=2, bounds=1, max_latent_length=4, mbpp=mbpp)
    return DomainForm(
        {"strong": base, "weak": replace(base, steps=1)},
        ntp,
        replace(ntp, e_steps=1, m_steps=1, settings=(("num_latents", 2),)),
        DomainRecipe(
            TraceMeasureRecipe(base, corpus=corpus, **small),
            TraceBoundRecipe(base, programs=1, num_latents=2, max_latent_length=3, corpus=corpus),
            (TraceMeasureRecipe(base, corpus=KindCorpus(kinds=KINDS[3:]), **small),),
            None if mbpp is None else cold,
        ),
        TraceRlvrRecipe(base, 0, steps=2, prompts=2, generations=2, completion_tokens=4, corpus=corpus),
        token_updates=3,
        compute_updates=4,
        gate=0.0,
    )


def test_a_toy_run_without_sandbox(tmp_path, model):
    """Base and RA3 on one base; the plan then says that all is done."""
    form = chosen(toy(model, None), ["strong"], ["base", "ra3"], ["transfer"])
    found = run_domain(Store(tmp_path), form, 1)
    rows = found["tables"]["strong"]
    assert rows["ce"]["base"] != rows["ce"]["ra3"]
    assert rows["runs"][0]["ra3"]["log"][0]["estep/tried_rate"] > 0 and rows["runs"][0]["ra3"]["drawn"] > 0
    assert [one["kinds"] for one in rows["runs"][0]["base"]["transfer"]] == [["lists"]]
    assert "rlvr_last" not in rows and rows["mbpp_right"]["base"]["n"] == 0
    json.dumps(found)
    assert all(stage.done for stage in plan(Store(tmp_path), form, 1))


@needs_bwrap
@pytest.mark.slow
@pytest.mark.timeout(900)  # some two CPU minutes
def test_all_columns_come_out(tmp_path, model, monkeypatch, capsys):
    """All arms on a base by the command, MBPP and GRPO too."""
    code = "def f{i}(n):\n    a = n + {i}\n    b = a * 2\n    return b - 1"
    rows = [
        {"task_id": 11 + i, "code": code.replace("{i}", str(i)), "test_setup_code": "",
         "test_list": [f"assert f{i}(1) == {2 * i + 1}", f"assert f{i}(2) == {2 * i + 3}"]}
        for i in range(2)
    ]  # fmt: skip
    mbpp = tmp_path / "mbpp.jsonl"
    mbpp.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(replication, "traces_form", lambda corpus, mbpp, model: toy(model, mbpp))
    words = ["replication", "--domain", "traces", "--json", "--cache", str(tmp_path / "cache"), "--mbpp", str(mbpp)]
    words += ["--model", model, "--base", "strong"]
    main(words)
    found = json.loads(capsys.readouterr().out)
    assert set(found["tables"]) == {"strong"} and found["domain"] == "traces"
    for of_base in found["tables"].values():
        names = {name for name, row in of_base.items() if isinstance(row, dict) and set(row) == set(ARMS)}
        assert names >= {
            "think_hard", "think_easy", "comment_right", "accuracy", "accuracy_forced", "ce", "elbo", "bound_multi",
            "transfer_accuracy", "mbpp_right", "mbpp_gain", "mbpp_gain_elsewhere", "rlvr_steps_to_50",
            "rlvr_steps_to_80", "rlvr_samples_to_50", "rlvr_samples_to_80", "rlvr_last",
        }  # fmt: skip
        for arm in MAIN:
            assert len(of_base["runs"][0][arm]["curve"]) == 2 and of_base["transfer_accuracy"][arm]["n"] == 1
        assert [arm for arm in ARMS if of_base["mbpp_gain"][arm]["n"]] == ["base", "ntp", "ntp_forced", "ra3"]
        assert set(of_base["wanted"]) >= {"accuracy_above_ntp", "accuracy_above_ntp_forced", "think_easy"}

    def refuse(*args, **kwargs):
        raise AssertionError("done again")

    monkeypatch.setattr("transformers.Trainer.train", refuse)
    main(words)
    again = json.loads(capsys.readouterr().out)
    assert all(again["tables"][base]["accuracy"] == of_base["accuracy"] for base, of_base in found["tables"].items())


@needs_bwrap
@pytest.mark.slow
def test_a_killed_run_of_grpo_goes_on(tmp_path, model, monkeypatch):
    """Killed before update 3 of 3, of which 2 are saved: the same curve as a run left alone."""
    base = PreparedRecipe(model, steps=1, batch_size=2)
    recipe = TraceRlvrRecipe(base, 0, steps=3, prompts=2, generations=2, completion_tokens=4)
    whole, halved = Store(tmp_path / "whole"), Store(tmp_path / "halved")
    found = reinforce_traces(whole, recipe, save_steps=2)

    def on_step_begin(self, args, state, control):
        if state.global_step == 2:
            raise KeyboardInterrupt
        return control

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("transformers.trainer.CallbackHandler.on_step_begin", on_step_begin)
        reinforce_traces(halved, recipe, save_steps=2)
    assert any(Path(halved.folder(recipe), "run").glob("checkpoint-2"))
    assert reinforce_traces(halved, recipe, save_steps=2)["accuracy"] == found["accuracy"]
    assert len(found["accuracy"]) == 3
