"""Push and pull with the real client against tests/hub_server.py: models, adapters, corpora, tokens, faults.

The client reads the Hub's address when it is imported, so it runs in two processes of tests/worker_hub.py; one is
offline and shares the other's cache.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, Request, client_environment, serving  # noqa: F401 (the fixture `hub`)
from test_cli import SMALL, SOURCE

from ra3_trl.cli.run import resume_command


tries_again = pytest.mark.skipif(
    version("huggingface_hub").startswith("1.5."), reason="the client of 1.5 does not try again what was cut off"
)


# Their tails are what is searched for. Put together here, so that no scanner of sources takes them for real ones.
ADA, BEA, CLEO, EVE = ("hf_" + name * 4 for name in ("AdaEnv0123", "BeaFile456", "CleoArgs78", "EveOther90"))
LEARNED = {"abstraction_head.safetensors", "abstraction_config.json", "ra3_config.json"}
PLAIN = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


class HubError(Exception):
    """What a call ended with, and the names of the exception's classes."""

    def __init__(self, classes: list[str], message: str):
        super().__init__(message)
        self.classes = classes


class Worker:
    """A process of tests/worker_hub.py: `worker.load("lab/name", revision="v1")`, with its log in a file."""

    def __init__(self, log: Path, environment: dict[str, str]):
        self.log = log
        command = [sys.executable, "-u", str(Path(__file__).with_name("worker_hub.py"))]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment
            )

    def __getattr__(self, call: str):
        def ask(*args, **options) -> Any:
            self.process.stdin.write(json.dumps([call, args, options]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            assert line, f"The worker is gone:\n{self.log.read_text()[-2000:]}"
            answer = json.loads(line)
            if "error" in answer:
                raise HubError(*answer["error"])
            return answer["value"]

        return ask


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """All that the workers write: `home` (cache and token file), logs, output folders."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def workers(place, hub) -> Iterator[dict[str, Worker]]:
    """One logged in as ada by `HF_TOKEN`, one offline; both begin at once, since they are slow to."""
    hub.accounts |= {ADA: ("ada", "lab"), BEA: ("bea", "lab"), CLEO: ("cleo", "lab"), EVE: ("eve", "other")}
    settings = {"online": {"HF_TOKEN": ADA}, "offline": {"HF_HUB_OFFLINE": "1"}}
    made = {
        name: Worker(place / f"{name}.log", client_environment(hub, place / "home", **more))
        for name, more in settings.items()
    }
    yield made
    for worker in made.values():
        worker.process.stdin.close()
        worker.process.wait(30)


@pytest.fixture
def online(workers, hub) -> Iterator[Worker]:
    """As ada; every fault that a test asked for must have come to pass."""
    workers["online"].environ(HF_TOKEN=ADA)
    yield workers["online"]
    left = hub.faults[:]
    hub.faults.clear()
    assert not left


@pytest.fixture(scope="module")
def base(place, tokenizers, tiny_model) -> str:
    """A plain checkpoint, without head."""
    folder = place / "base"
    tiny_model("llama", tokenizers["newline_indent"]).save_pretrained(folder)
    tokenizers["newline_indent"].save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pushed(workers, base, place) -> dict[str, dict]:
    """A trainer's states and commits in `lab/one`: before training, and after."""
    online = workers["online"]
    online.trainer("one", base, output_dir=str(place / "one"), hub_model_id="lab/one")
    first = online.push("one")
    online.train("one")
    return {"first": first, "second": online.push("one", commit_message="Trained")}


def asked(hub: Hub, kind: str, words: str = "") -> list[Request]:
    """Requests of an endpoint, with some words in their path."""
    return [request for request in hub.requests if request.kind == kind and words in request.path]


def files_with(secret: str, folder: Path) -> list[Path]:
    """Files that hold a token's tail, the token file apart."""
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / "home" / "token"]
    return [path for path in files if secret[3:].encode() in path.read_bytes()]


# ---- push, pull, revisions ----


def test_a_push_has_all_and_loads_bit_for_bit(online, hub, pushed):
    first, second = pushed["first"], pushed["second"]
    assert (first["repo"], second["repo"]) == ("lab/one", "lab/one")
    assert first["weights"] != second["weights"] and first["head"] != second["head"]
    repo = hub.repo("lab/one")
    assert repo.titles == ["initial commit", "End of training", "Trained"]
    assert set(repo.files()) == PLAIN | LEARNED | {"README.md", ".gitattributes"}
    for revision, expected in (("main", second), (second["commit"], second), (first["commit"], first)):
        assert online.load("lab/one", revision=revision).items() <= expected.items()
        found = online.wrapper("pulled", "lab/one", revision=revision)
        assert found.items() <= expected.items()
        assert found["latents"] == 2  # `num_latents` of tests/worker_hub.py
    assert first["trained_on"] == 0 < second["trained_on"]


def test_the_server_itself(online, hub, pushed, base):
    """What the other tests rely on: it knows who asks, lists what is there, and takes nothing that is not whole."""
    assert "'name': 'ada'" in online.api("whoami") and "'name': 'lab'" in online.api("whoami")
    assert pushed["second"]["commit"] in online.api("list_repo_refs", repo_id="lab/one")
    listed = online.api("get_paths_info", repo_id="lab/one", paths=["model.safetensors", "none"])
    assert listed.count("RepoFile(") == 1
    assert hashlib.sha256(hub.repo("lab/one").files()["model.safetensors"].data).hexdigest() in listed
    online.api("auth_check", repo_id="lab/one", write=True)
    with pytest.raises(HubError, match="no right to write"):
        online.api("auth_check", repo_id="lab/one", write=True, token=EVE)
    lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "lfsFile", "value": {"path": "x", "oid": "0" * 64}}]
    commit = "\n".join(map(json.dumps, lines)).encode()
    for method, path, body in (("PUT", f"/lfs/{'0' * 64}", b"y"), ("POST", "/api/models/lab/one/commit/main", commit)):
        request = urllib.request.Request(hub.url + path, body, {"Authorization": f"Bearer {ADA}"}, method=method)
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(request)
    assert hub.repo("lab/one").titles[-1] == "Trained"


def test_tags_and_what_is_not_there(online, pushed):
    online.api("create_tag", repo_id="lab/one", tag="v1.0", revision=pushed["first"]["commit"])
    assert online.load("lab/one", revision="v1.0")["weights"] == pushed["first"]["weights"]
    for call in (online.load, lambda *a, **b: online.wrapper("x", *a, **b)):
        with pytest.raises(HubError, match="v9 is not a valid git identifier") as caught:
            call("lab/one", revision="v9")
        assert "OSError" in caught.value.classes
        with pytest.raises(HubError, match="lab/none is not a local folder and is not a valid model identifier"):
            call("lab/none")
    with pytest.raises(HubError, match="lab/none"):
        online.trainer("none", "lab/none", output_dir="never")


def test_training_goes_on_from_the_hub(online, pushed, place):
    """The head that was pushed is trained on, and an adapter finds its base there."""
    online.trainer("again", "lab/one", output_dir=str(place / "again"), model_init_kwargs={"revision": "main"})
    assert online.state("again").items() >= {k: pushed["second"][k] for k in ("weights", "head")}.items()
    online.trainer("lora", "lab/one", lora=True, output_dir=str(place / "lora"), hub_model_id="lab/lora")
    adapter = online.push("lora")
    assert adapter["logits"] != pytest.approx(pushed["second"]["logits"], abs=1e-3)
    for found in (online.load("lab/lora"), online.wrapper("lora2", "lab/lora")):
        assert found["logits"] == pytest.approx(adapter["logits"], abs=1e-5)


def test_a_private_repository(online, hub, base, place):
    online.trainer("private", base, output_dir=str(place / "private"), hub_model_id="lab/hush", hub_private_repo=True)
    weights = online.push("private")["weights"]
    assert hub.repo("lab/hush").private
    for token in (False, EVE):  # first, since what is in the cache is shown to all
        for call in (online.load, lambda *a, **b: online.wrapper("x", *a, **b)):
            with pytest.raises(HubError, match="lab/hush is not a local folder and is not a valid model identifier"):
                call("lab/hush", token=token)
    assert online.load("lab/hush")["weights"] == online.load("lab/hush", token=CLEO)["weights"] == weights


def test_a_gated_repository(online, hub, base):
    online.api("create_repo", repo_id="lab/gated")
    online.api("upload_folder", repo_id="lab/gated", folder_path=base)
    hub.repo("lab/gated").gated = True
    with pytest.raises(HubError, match="You are trying to access a gated repo"):
        online.load("lab/gated", token=EVE)
    assert online.load("lab/gated") == online.load(base)


# ---- the wrapper ----


def test_wrapper_pushed_and_pulled(online, hub, base):
    made = online.wrapper("made", base, trained_on=7)
    branch = online.push("made", repo_id="lab/wrapped", private=True, revision="v2")
    pull = online.push("made", repo_id="lab/wrapped", create_pr=True)
    repo = hub.repo("lab/wrapped")
    assert repo.private and set(repo.files()) == {".gitattributes"}
    assert (repo.find("v2"), repo.find("refs/pr/1"), pull["pull"]) == (branch["commit"], pull["commit"], 1)
    for revision in ("v2", "refs/pr/1", branch["commit"]):
        assert online.wrapper("made2", "lab/wrapped", revision=revision) == made
    assert made["trained_on"] == 7


def test_a_repository_without_head(online, workers, base):
    online.api("create_repo", repo_id="ada/plain")
    online.api("upload_folder", repo_id="ada/plain", folder_path=base)
    said = len(online.log.read_text())
    for worker in (online, workers["offline"]):  # it is in the cache then
        assert worker.wrapper("plain", "ada/plain")["trained_on"] == 0
    assert "ada/plain has no abstraction head; a fresh one is used" in online.log.read_text()[said:]


# ---- push while training ----


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_hub_strategy(online, hub, base, place, strategy):
    """What goes up during training is whole, has no pickled settings and no token."""
    folder, name = place / strategy, f"lab/{strategy}"
    settings = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_strategy": strategy}
    online.trainer(strategy, base, output_dir=str(folder), hub_model_id=name, hub_token=CLEO, **settings)
    inside = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-1"}.get(strategy)
    if inside:
        hub.fail("validate", "slow", times=2)  # of the card, when it is written and in the model's push
    trained, repo = online.train(strategy), hub.repo(name)
    commits = dict(zip(repo.titles, repo.commits, strict=True))
    if strategy == "end":
        assert list(commits) == ["initial commit"]
    else:
        at = commits["Training in progress, update 1"]  # later ones are left out while an earlier one is under way
        assert online.load(name, revision=at) == online.load(str(folder / "checkpoint-1"))
        assert online.wrapper("x", name, revision=at) == online.wrapper("y", str(folder / "checkpoint-1"))
        assert set(repo.commits[at]) == PLAIN | LEARNED | {".gitattributes", "README.md"}
    if inside:
        whole = repo.commits[commits["Training in progress, update 1, checkpoint"]]
        there = {path for path in whole if path.startswith(inside)}
        assert there == {f"{inside}/{path.name}" for path in (folder / "checkpoint-1").iterdir()}
        assert online.wrapper("x", name, subfolder=inside)["trained_on"] > 0
        assert list(commits).index("Training in progress, update 1") == 1  # the checkpoint does not overtake it
    online.save(strategy)  # pushes what is not there yet, with any strategy
    assert strategy != "end" or repo.titles[1:] == ["Model save"]
    assert online.wrapper("x", name) == trained
    assert {request.user for request in asked(hub, "commit", name)} == {"cleo"}
    assert [path for path, data in hub.everything() if CLEO[3:].encode() in data] == []
    assert files_with(CLEO, folder) == []


def test_a_run_goes_on_from_a_checkpoint_of_the_hub(online, base, place):
    """With the weights of a run left alone."""
    settings = {"save_strategy": "steps", "save_steps": 1, "hub_model_id": "lab/far"}
    pushing = {"push_to_hub": True, "hub_strategy": "all_checkpoints"}
    online.trainer("near", base, output_dir=str(place / "near"), **settings, **pushing)
    alone = online.train("near")
    pulled = Path(online.api("snapshot_download", repo_id="lab/far", local_dir=str(place / "pulled")))
    online.trainer("far", base, output_dir=str(place / "far"), **settings)
    assert online.train("far", resume_from_checkpoint=str(pulled / "checkpoint-1")) == alone


def test_a_failed_push_while_training_is_said(online, hub, base, place):
    """Training goes on, the log says what failed, and the next push makes up for it."""
    settings = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_strategy": "every_save"}
    online.trainer("unlucky", base, output_dir=str(place / "unlucky"), hub_model_id="lab/unlucky", **settings)
    hub.fail("commit", 503, times=2, match="lab/unlucky")
    said = len(online.log.read_text())
    trained = online.train("unlucky")
    hub.faults.clear()
    assert "503" in online.log.read_text()[said:]
    assert hub.repo("lab/unlucky").titles == ["initial commit"]
    online.save("unlucky")
    assert online.wrapper("x", "lab/unlucky") == trained


# ---- tokens ----


def test_what_must_not_leave(online, hub, base, place):
    """`.env` stays at home; a file with a token that the process knows ends the push before anything is uploaded."""
    out = place / "careful"
    online.trainer("careful", base, output_dir=str(out), hub_model_id="lab/careful", hub_token=ADA)
    out.mkdir(exist_ok=True)
    (out / ".env").write_text(f"HF_TOKEN={ADA}")
    online.push("careful")
    assert ".env" not in hub.repo("lab/careful").files()
    (out / "notes.txt").write_text(f"as {ADA}")
    before = hub.repo("lab/careful").titles
    with pytest.raises(HubError, match=r"notes\.txt holds .*, and would be uploaded"):
        online.push("careful")
    assert hub.repo("lab/careful").titles == before
    for name in (".env", "notes.txt"):  # a later test looks for tokens in all files
        (out / name).unlink()


def test_tokens_of_the_usual_places(online, hub, base, place):
    """An argument goes before `args.hub_token`, that before `HF_TOKEN`, that before the file of `hf auth login`."""
    (place / "home").mkdir(exist_ok=True)
    (place / "home" / "token").write_text(BEA)
    users = {}
    for who, variable, settings, options in (
        ("bea", None, {}, {}),
        ("ada", ADA, {}, {}),
        ("cleo", ADA, {"hub_token": CLEO}, {}),
        ("eve", ADA, {"hub_token": CLEO}, {"token": EVE}),
    ):
        online.environ(HF_TOKEN=variable)
        name = f"{'other' if who == 'eve' else 'lab'}/of-{who}"
        online.trainer(who, base, output_dir=str(place / who), hub_model_id=name, **settings)
        online.push(who, **options)
        users[who] = {request.user for request in asked(hub, "commit", name)}
    (place / "home" / "token").unlink()
    assert users == {who: {who} for who in users}


def test_no_token_in_what_trackers_get(online, base, place):
    """The settings go to the tracker's file; a model's token stands among them."""
    folder = place / "tracked"
    settings = {"report_to": ["tensorboard"], "hub_token": CLEO, "model_init_kwargs": {"token": CLEO}}
    online.trainer("tracked", base, output_dir=str(folder), **settings)
    online.train("tracked")
    online.save("tracked")
    assert list(folder.rglob("events.out*"))
    assert files_with(CLEO, folder) == []


def test_the_command_to_go_on_has_no_token():
    for given in (["--hub_token", CLEO], [f"--hub_token={CLEO}"], ["--hub-token", CLEO]):
        said = resume_command(" ".join(["ra3", "train", *given, "--output_dir", "out"]))
        assert CLEO not in said
        assert said.endswith("--output_dir out --resume_from_checkpoint true")


def test_wrong_and_missing_tokens(online, hub, base, place):
    """Refused before training where the run is to push; a token that is withdrawn later costs no checkpoint."""
    pushing = {"output_dir": str(place / "wrong"), "hub_model_id": "lab/wrong"}
    with pytest.raises(HubError, match="Invalid credentials in Authorization header") as caught:
        online.trainer("wrong", base, push_to_hub=True, hub_token="hf_wrong", **pushing)
    assert "OSError" in caught.value.classes  # `ra3` prints these without a traceback
    online.environ(HF_TOKEN=None)
    with pytest.raises(HubError, match="401"):
        online.trainer("wrong", base, push_to_hub=True, **pushing)
    hub.accounts["hf_for-now"] = ("ada", "lab")
    online.trainer("wrong", base, push_to_hub=True, hub_token="hf_for-now", **pushing)
    trained = online.train("wrong")
    del hub.accounts["hf_for-now"]
    with pytest.raises(HubError, match="Invalid credentials"):
        online.save("wrong")
    assert online.wrapper("x", str(place / "wrong")) == trained
    assert hub.repo("lab/wrong").titles == ["initial commit"]


# ---- trouble ----


def test_names_that_are_taken(online, hub, base, place):
    """Someone else's name is refused, and their repository stays as it is; one's own gets a new commit."""
    with pytest.raises(HubError, match='rights to create a model under the namespace "other"'):
        online.trainer("x", base, output_dir=str(place / "x"), push_to_hub=True, hub_model_id="other/new")
    online.api("create_repo", repo_id="other/taken", token=EVE)
    with pytest.raises(HubError, match="403 Forbidden: You have no right to write to other/taken"):
        online.trainer("x", base, output_dir=str(place / "x"), push_to_hub=True, hub_model_id="other/taken")
        online.push("x")
    assert hub.repo("other/taken").titles == ["initial commit"]
    online.api("create_repo", repo_id="lab/mine")
    online.api("upload_file", repo_id="lab/mine", path_in_repo="NOTES", path_or_fileobj=__file__)
    with pytest.raises(HubError, match="You already created this model repo"):
        online.api("create_repo", repo_id="lab/mine")
    online.trainer("mine", base, output_dir=str(place / "mine"), hub_model_id="lab/mine")
    online.push("mine")
    assert {"NOTES", "model.safetensors"} <= set(hub.repo("lab/mine").files())


@tries_again
def test_an_interrupted_upload_is_tried_again(online, hub, base):
    """By the client itself, whether the connection is cut in the middle of a file or the answer is 503."""
    for number, (how, name) in enumerate((("drop", "lab/cut"), (503, "lab/down")), 100):
        made, before = online.wrapper("cut", base, trained_on=number), len(asked(hub, "put"))
        hub.fail("put", how)
        online.push("cut", repo_id=name)
        # The head twice; the weights are known already, from another repository.
        assert len(asked(hub, "put")) - before == 2
        assert hub.repo(name).titles == ["initial commit", "Upload model with abstraction head"]
        assert online.wrapper("cut2", name) == made


@pytest.mark.parametrize(("kind", "how"), [("put", 403), ("batch", 400), ("preupload", 400), ("commit", 503)])
def test_a_push_that_is_given_up_leaves_nothing_half_done(online, hub, base, kind, how):
    made = online.wrapper("given", base, trained_on=sum(map(ord, kind)))
    hub.fail(kind, how)
    with pytest.raises(HubError):
        online.push("given", repo_id=f"lab/given-{kind}")
    assert set(hub.repo(f"lab/given-{kind}").files()) == {".gitattributes"}
    online.push("given", repo_id=f"lab/given-{kind}")
    assert online.wrapper("x", f"lab/given-{kind}") == made


def test_a_commit_whose_answer_is_lost(online, hub, base):
    """The push fails although its commit is there; pushing again makes no second one."""
    made = online.wrapper("lost", base, trained_on=3)
    hub.fail("commit", "lost")
    with pytest.raises(HubError, match="Server disconnected"):
        online.push("lost", repo_id="lab/lost")
    online.push("lost", repo_id="lab/lost")
    assert len(hub.repo("lab/lost").titles) == 2
    assert online.wrapper("x", "lab/lost") == made


@tries_again
def test_an_interrupted_download_is_tried_again(online, hub, base):
    made = online.wrapper("x", base, trained_on=5)
    online.push("x", repo_id="lab/torn")
    before = len(asked(hub, "resolve", "model.safetensors"))
    hub.fail("resolve", "drop", match="model.safetensors")
    assert online.wrapper("y", "lab/torn") == made
    assert len(asked(hub, "resolve", "model.safetensors")) - before == 2


def test_offline(online, workers, hub, pushed, base):
    """What is in the cache loads at any revision that was pulled, without a request; the rest says what to do."""
    offline, first, second = workers["offline"], pushed["first"], pushed["second"]
    online.load("lab/one"), online.wrapper("x", "lab/one", revision=first["commit"])
    before = len(hub.requests)
    assert offline.load("lab/one")["weights"] == second["weights"]
    assert offline.wrapper("x", "lab/one").items() <= second.items()
    assert offline.wrapper("x", "lab/one", revision=first["commit"]).items() <= first.items()
    for repo, options in (("lab/one", {"revision": "never-pulled"}), ("lab/elsewhere", {})):
        for call in (offline.load, lambda *a, **b: offline.wrapper("x", *a, **b)):
            with pytest.raises(HubError, match="offline") as caught:
                call(repo, **options)
            assert "OSError" in caught.value.classes
    with pytest.raises(HubError, match="offline mode is enabled") as caught:
        offline.trainer("x", base, output_dir="never", push_to_hub=True)
    assert "OSError" in caught.value.classes
    assert len(hub.requests) == before


# ---- data sets ----


def test_data_sets(online, workers, hub):
    rows = [{"text": f"x = {i}\n", "license": "mit"} for i in range(5)]
    online.push_rows("lab/rows", rows, private=True)
    online.push_rows("lab/rows", rows[:2], revision="few")
    repo = hub.repo("lab/rows", "dataset")
    assert repo.private
    with pytest.raises(HubError, match="lab/rows"):
        online.load_rows("lab/rows", token=EVE)
    assert set(repo.files()) == {".gitattributes", "README.md", "data/train-00000-of-00001.parquet"}
    assert online.load_rows("lab/rows") == rows
    assert online.load_rows("lab/rows", revision="few") == rows[:2]
    hub.fail("commit", 503)
    with pytest.raises(HubError, match="503"):
        online.push_rows("lab/rows", rows[:1])
    assert online.load_rows("lab/rows") == rows
    online.push_plain_rows("lab/plain-rows", rows)
    for worker in (online, workers["offline"]):  # it is in the cache then
        assert worker.load_rows("lab/plain-rows") == rows


def test_the_annotated_corpus(online, hub, base, place):
    online.trainer("corpus", base, output_dir=str(place / "corpus"))
    with pytest.raises(HubError, match="8 rows have no licence"):
        online.push_corpus("corpus", repo_id="lab/corpus")
    assert ("dataset", "lab/corpus") not in hub.repos
    online.push_corpus("corpus", repo_id="lab/corpus", allow_missing_licenses=True, token=CLEO, private=True)
    assert {request.user for request in asked(hub, "commit", "lab/corpus")} == {"cleo"}
    assert hub.repo("lab/corpus", "dataset").private
    rows = online.load_rows("lab/corpus")
    assert len(rows) == 8 and {"text", "annotated_text", "latents"} <= set(rows[0])


# ---- the command line ----


def test_commands(online, hub, base, place):
    code = place / "code"
    code.mkdir()
    for i in range(1, 4):
        (code / f"part{i}.py").write_text("# SPDX-License-Identifier: MIT\n" + SOURCE.replace("{i}", str(i)), "utf-8")
    train = ["train", "--model_name_or_path", base, "--code_dir", str(code), *SMALL, "--push_to_hub"]
    options = ["--hub_model_id", "lab/cli", "--hub_token", CLEO, "--hub_private_repo", "true"]
    output = place / "cli"
    assert online.ra3([*train, *options, "--output_dir", str(output)]) == 0
    repo = hub.repo("lab/cli")
    assert repo.private
    assert {*PLAIN, *LEARNED, "README.md", "train_results.json"} <= set(repo.files())
    assert online.wrapper("x", "lab/cli") == online.wrapper("y", str(output))
    said = len(online.log.read_text())
    assert f"Pushed to {hub.url}/lab/cli." in online.log.read_text()
    options = ["--hub_model_id", "other/cli", "--hub_token", CLEO, "--output_dir", str(place / "cli2")]
    assert online.ra3([*train, *options]) == 2
    assert "error: " in online.log.read_text()[said:] and "Traceback" not in online.log.read_text()[said:]
    annotate = ["annotate", "lab/cli", "--code_dir", str(code), "--max_length", "128"]
    annotate += ["--num_latents", "1", "--max_latent_length", "3", "--push_to_hub", "lab/cli-rows", "--private"]
    assert online.ra3(annotate) == 0
    rows = online.load_rows("lab/cli-rows")
    assert len(rows) == 6 and {"annotated_text", "latents", "license"} <= set(rows[0])  # 3 files of 2 functions
    assert files_with(CLEO, output) == []


def test_a_space(online, hub, base, pushed, place):
    """`ra3 play --push_to_space` of a Hub id and of a folder: one commit, an app that names the checkpoint."""
    assert online.ra3(["play", "lab/one", "--push_to_space", "lab/play", "--private", "--horizon", "3"]) == 0
    repo = hub.repo("lab/play", "space")
    assert f"Pushed to {hub.url}/spaces/lab/play." in online.log.read_text()
    files = {name: file.data.decode() for name, file in repo.files().items()}
    assert repo.private and set(files) == {".gitattributes", "README.md", "app.py", "requirements.txt"}
    assert 'main(["play", "lab/one", "--horizon", "3"])' in files["app.py"]
    assert repo.titles == ["initial commit", "The page of ra3 play"]
    assert online.ra3(["play", base, "--push_to_space", "lab/of-a-folder"]) == 0
    files = hub.repo("lab/of-a-folder", "space").files()
    assert {name.removeprefix("checkpoint/") for name in files if "/" in name} == PLAIN
    assert b'main(["play", "checkpoint"])' in files["app.py"].data and place.name.encode() not in files["app.py"].data
    said = len(online.log.read_text())
    assert online.ra3(["play", "lab/one", "--push_to_space", "other/play"]) == 2  # ada is no member of other
    assert "error: " in online.log.read_text()[said:] and "Traceback" not in online.log.read_text()[said:]
    assert ("space", "other/play") not in hub.repos


def test_no_token_is_left_anywhere(workers, hub, place):
    """The last test: nothing that any other one wrote, uploaded, logged or asked for has a token in it."""
    for token in (ADA, BEA, CLEO, EVE):
        assert files_with(token, place) == []
        assert [name for name, data in hub.everything() if token[3:].encode() in data] == []
