"""`ra3 annotate` in shards: the same bytes whoever does them, killed anywhere, and what is refused or fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset, load_dataset
from test_annotated_dataset import CODE, NotedHub
from test_killed import killed_at

import ra3_trl.hub.shards
from ra3_trl.cli import annotate as command
from ra3_trl.cli.main import main as ra3
from ra3_trl.hub import Manifest, Origin, RowAnnotator, ShardedAnnotation, Share, annotate_dataset, checkpoint_hash
from ra3_trl.hub.shards import WHOLE, cut_into_shards, rows_of_a_shard


ROOT = Path(__file__).parent.parent
TEXTS = [CODE.replace("{i}", str(i)) for i in range(5)]
CORPUS = Dataset.from_dict({"text": TEXTS, "stars": list(range(5))})
SETTINGS = {"prior_alpha": 0.5, "num_latents": 2, "max_length": 128, "horizon": 1, "max_latent_length": 4}


@pytest.fixture(scope="module")
def annotator(tiny_model, tokenizers) -> RowAnnotator:
    from ra3_trl import Policy

    tokenizer = tokenizers["newline_indent"]
    policy = Policy.open(tiny_model("llama", tokenizer), tokenizer=tokenizer, use_cpu=True, **SETTINGS)
    policy.args.disable_tqdm = True
    return RowAnnotator(policy)


def origin(corpus: Dataset, shard_rows: int = 2, **changes) -> Origin:
    rows = len(corpus) if isinstance(corpus, Dataset) else None
    values = {"settings": {"seed": 0}, "checkpoint": "it", "checkpoint_hash": "1", "source": "rows", "rows": rows}
    return Origin(**values | {"shard_rows": shard_rows} | changes)


def annotate(annotator, folder: Path, corpus=CORPUS, share: Share = WHOLE, shard_rows: int = 2, **options) -> str:
    manifest = Manifest(folder, origin(corpus, shard_rows))
    return ShardedAnnotation(annotator, corpus, manifest, share, **options).run()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def rows(folder: Path) -> list[dict]:
    names = [str(path) for path in sorted(folder.glob("*.parquet"))]
    return load_dataset("parquet", data_files=names, split="train").to_list()


def entries(folder: Path) -> list[dict]:
    return json.loads((folder / "manifest.json").read_text())["shards"]


@pytest.fixture(scope="module")
def alone(annotator, tmp_path_factory) -> Path:
    """Five rows in three shards, by one process."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    annotate(annotator, folder)
    return folder


def test_shards_are_the_rows_of_the_data_set(annotator, alone):
    whole = annotate_dataset(annotator.policy, CORPUS)
    assert load_dataset(str(alone), split="train").to_list() == whole.to_list() == rows(alone)
    assert load_dataset("parquet", data_dir=str(alone), split="train").features == whole.features
    manifest = json.loads((alone / "manifest.json").read_text())
    assert [e["file"] for e in manifest["shards"]] == [f"train-00000{i}.parquet" for i in range(3)]
    assert [(e["first_row"], e["rows_in"], e["rows_out"]) for e in manifest["shards"]] == [
        (0, 2, 2), (2, 2, 2), (4, 1, 1),
    ]  # fmt: skip
    for entry, first in zip(manifest["shards"], (0, 2, 4), strict=True):
        part = whole.select(range(first, first + entry["rows_in"]))
        assert entry["latents"] == sum(map(len, part["latents"])) > 0
        assert entry["boundaries"] == sum(part["num_boundaries"])
        # What a tokenizer makes of the text is about what was spliced; the end-of-text token is in it too.
        ids = [len(annotator.policy.tokenizer(text).input_ids) for text in part["annotated_text"]]
        assert sum(ids) <= entry["tokens"] <= sum(ids) + entry["latents"] * 8 + len(ids)
        assert entry["seconds"] > 0 and entry["settings_hash"] == origin(CORPUS).settings_hash
        assert entry["checkpoint_hash"] == "1"
    for name in ("rows_in", "rows_out", "latents", "tokens"):
        assert manifest[name] == sum(e[name] for e in manifest["shards"])
    assert sorted(path.name for path in alone.glob(".incomplete/*") if path.suffix != ".lock") == []


@pytest.mark.parametrize("count", [2, 4])
def test_processes_do_not_matter(annotator, alone, tmp_path, count):
    """Byte for byte, in whatever order they come; with four of them one has nothing to do."""
    for index in reversed(range(count)):
        annotate(annotator, tmp_path / "out", share=Share(index, count))
    assert files(tmp_path / "out") == files(alone)


def test_the_cut_does_not_matter(annotator, alone, tmp_path):
    annotate(annotator, tmp_path / "out", shard_rows=3)
    assert rows(tmp_path / "out") == rows(alone) and len(files(tmp_path / "out")) == 2
    upside_down = CORPUS.select(range(4, -1, -1))  # a row's noise is its content's, and not its place's
    annotate(annotator, tmp_path / "turned", corpus=upside_down)
    assert rows(tmp_path / "turned") == rows(alone)[::-1]


def test_streams(annotator, alone, tmp_path):
    """With features and without; the same bytes."""
    plain = IterableDataset.from_generator(CORPUS.to_list)
    assert plain.features is None
    for name, stream in (("a", CORPUS.to_iterable_dataset()), ("b", plain)):
        for index in range(2):
            annotate(annotator, tmp_path / name, corpus=stream, share=Share(index, 2))
        assert files(tmp_path / name) == files(alone)
    numbers = [(n, shard and shard.size) for n, shard in cut_into_shards(plain, 2, lambda n: n != 1)]
    assert numbers == [(0, 2), (1, None), (2, 1)]


def test_rows_of_a_shard():
    """16 shards of 2 or 3 rows of 40; 3.5 million rows, and streams, in thousands."""
    assert [rows_of_a_shard(n) for n in (1, 16, 40, 3_500_000, None)] == [1, 1, 3, 1000, 1000]


def test_killed_anywhere(annotator, alone, tmp_path):
    """Before each change of a file: what can be read is whole, a finished shard is left as it is, and going on gives
    the files of a run left alone."""
    folder, number = tmp_path / "out", 0
    while killed_at(number, lambda: annotate(annotator, folder)):
        before = {e["file"]: (folder / e["file"]).stat().st_mtime_ns for e in entries(folder)} if (
            folder / "manifest.json").exists() else {}  # fmt: skip
        there = files(folder)
        assert all(content == files(alone)[name] for name, content in there.items()) and set(before) <= set(there)
        if there:
            assert load_dataset("parquet", data_dir=str(folder), split="train").num_rows == len(rows(folder))
        annotate(annotator, folder)
        assert files(folder) == files(alone)
        assert all((folder / name).stat().st_mtime_ns == time for name, time in before.items())
        assert [e["shard"] for e in entries(folder)] == [0, 1, 2]
        assert [path.name for path in folder.glob(".incomplete/*") if path.suffix != ".lock"] == []
        shutil.rmtree(folder)
        number += 1
    assert number > 10


def broken_corpus() -> Dataset:
    return Dataset.from_dict({"text": [TEXTS[0], None, *TEXTS[2:]], "stars": list(range(5))})


def test_a_shard_that_fails_does_not_take_others_along(annotator, alone, tmp_path, monkeypatch):
    """Row 1 has no text, row 4 brings the model down; their shards fail, and later they alone are done."""

    class Crashing(RowAnnotator):
        def __call__(self, example, row=None):
            if example.text == TEXTS[4]:
                raise RuntimeError("out of memory")
            return super().__call__(example, row)

    folder = tmp_path / "out"
    with pytest.raises(ValueError, match=r"2 shards failed, 1 are finished .* shard 0: row 1: `text` is None.*"
                       r"shard 2: row 4: RuntimeError: out of memory.*`skip_broken_rows`"):  # fmt: skip
        annotate(Crashing(annotator.policy), folder, corpus=broken_corpus())
    assert files(folder) == {"train-000001.parquet": files(alone)["train-000001.parquet"]}
    assert set(json.loads((folder / "manifest.json").read_text())["failed"]) == {"0", "2"}
    untouched = (folder / "train-000001.parquet").stat().st_mtime_ns
    annotate(annotator, folder)  # the mended corpus
    assert files(folder) == files(alone) and (folder / "train-000001.parquet").stat().st_mtime_ns == untouched
    assert json.loads((folder / "manifest.json").read_text())["failed"] == {}


def test_broken_rows_are_left_out(annotator, alone, tmp_path):
    annotate(annotator, tmp_path / "out", corpus=broken_corpus(), skip_broken_rows=True)
    assert rows(tmp_path / "out") == [row for i, row in enumerate(rows(alone)) if i != 1]
    first = entries(tmp_path / "out")[0]
    assert (first["rows_in"], first["rows_out"], first["left_out"]) == (2, 1, [1])


@pytest.mark.parametrize("form", ["text", "tokens"])
def test_a_shard_of_broken_rows_alone_is_empty(annotator, tmp_path, form):
    """The first of three shards has no row that can be read, and is finished all the same."""
    corpus, folder = Dataset.from_dict({"text": [None, None, *TEXTS[2:]], "stars": list(range(5))}), tmp_path / "out"
    manifest = Manifest(folder, origin(corpus, form=form))
    ShardedAnnotation(annotator, corpus, manifest, skip_broken_rows=True).run()
    assert [(e["rows_out"], e["left_out"]) for e in entries(folder)][0] == (0, [0, 1]) and len(entries(folder)) == 3
    column, values = {"text": ("stars", [2, 3, 4]), "tokens": ("row", [2, 3, 4])}[form]
    assert [row[column] for row in rows(folder)] == values == load_dataset(str(folder), split="train")[column][:]


def test_a_process_that_fails_waits_for_its_job(annotator, tmp_path, monkeypatch):
    """Else a launcher would end the others; another job's shards are no matter."""
    folder, waited = tmp_path / "out", []

    def other_process(seconds):
        waited.append(sorted(Manifest(folder, origin(CORPUS, 1)).finished()))
        annotate(annotator, folder, corpus=broken_corpus(), share=Share(0, 4, 2), shard_rows=1)

    monkeypatch.setattr(ra3_trl.hub.shards.time, "sleep", other_process)
    with pytest.raises(ValueError, match=r"shard 1: row 1: `text` is None"):
        annotate(annotator, folder, corpus=broken_corpus(), share=Share(1, 4, 2), shard_rows=1)
    assert waited == [[]] and set(files(folder)) == {"train-000000.parquet", "train-000004.parquet"}


def test_a_disk_with_room_for_the_file_and_not_for_the_manifest(annotator, tmp_path, monkeypatch):
    def full(manifest, entry):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Manifest, "add", full)
    with pytest.raises(
        OSError, match=r"train-000000.parquet can't be written to .*No space left.*0 shards .* make room"
    ):
        annotate(annotator, tmp_path / "out")


def test_a_full_disk(annotator, alone, tmp_path, monkeypatch):
    write = ra3_trl.hub.shards.pq.write_table

    def full(table, path):
        if (tmp_path / "out" / "train-000000.parquet").exists():
            Path(path).write_bytes(b"PAR1")
            raise OSError(28, "No space left on device")
        write(table, path)

    with monkeypatch.context() as patch:
        patch.setattr(ra3_trl.hub.shards.pq, "write_table", full)
        with pytest.raises(OSError, match=r"train-000001.parquet can't be written .*No space left.*1 shards are"):
            annotate(annotator, tmp_path / "out")
    assert set(files(tmp_path / "out")) == {"train-000000.parquet"}
    assert [path.name for path in (tmp_path / "out" / ".incomplete").iterdir() if path.suffix != ".lock"] == []
    annotate(annotator, tmp_path / "out")
    assert files(tmp_path / "out") == files(alone)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"settings": {"seed": 1}}, r"has shards of `seed` 0, and now it is 1"),
        (
            {"checkpoint_hash": "2"},
            r"checkpoint 'it' with the hash 1, and 'it' has 2: weights or tokenizer",
        ),
        ({"rows": 6}, r"a corpus whose `rows` is 5, and now it is 6"),
        ({"source": "else"}, r"a corpus whose `source` is 'rows', and now it is 'else'"),
        ({"shard_rows": 3}, r"a corpus whose `shard_rows` is 2, and now it is 3"),
    ],
)
def test_what_changes_between_shards_is_refused(alone, changes, message):
    before = (alone / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        Manifest(alone, origin(CORPUS, **changes))
    assert (alone / "manifest.json").read_bytes() == before


def test_other_folders_and_rows_are_refused(annotator, alone, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(alone, folder)
    with pytest.raises(ValueError, match=r"rows 2 to 3 of the corpus are not those that train-000001.parquet was"):
        annotate(annotator, folder, corpus=CORPUS.select([0, 1, 3, 2, 4]))
    (folder / "train-000001.parquet").write_bytes(b"half")  # not as it was written: done again
    annotate(annotator, folder)
    assert files(folder) == files(alone)
    for damaged in ("{", '{"shards": [], "failed": {}}'):
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match="manifest.json of .* is damaged"):
            annotate(annotator, folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="there already and has no manifest.json"):
        annotate(annotator, folder)


def test_the_hash_of_a_checkpoint(annotator):
    """It is of what weights hold."""
    policy, before = annotator.policy, checkpoint_hash(annotator.policy)
    weight = next(policy.model.parameters()).data
    assert len(before) == 16 and checkpoint_hash(policy) == before
    weight[0, 0] += 1
    assert checkpoint_hash(policy) != before
    weight[0, 0] -= 1


def test_shards_are_pushed_as_they_are_finished(annotator, tmp_path, monkeypatch):
    """A commit a minute at most, and one at the end; the first one in the place of older data."""
    from ra3_trl.hub import DatasetPush

    pushes = []

    class Hub(NotedHub):
        def upload_folder(self, folder_path, **kwargs):
            pushes.append((sorted(path.name for path in Path(folder_path, "data").iterdir()), kwargs))
            assert not {p.name for p in Path(folder_path).rglob("*")} & {"manifest.json", ".incomplete"}
            return super().upload_folder(folder_path, **kwargs)

    monkeypatch.setattr("ra3_trl.hub.publish.HfApi", Hub)
    # A shard takes 45 seconds: 45 are too few for a push, 90 are enough, 135 too few for another one.
    monkeypatch.setattr(ra3_trl.hub.shards.time, "time", lambda: 45.0 * len(files(tmp_path / "out")))
    cards = []
    options = {"push": DatasetPush("org/name", dataset_license="MIT"), "card": lambda facts, name: cards.append(facts)}
    options["card"] = lambda facts, name: cards.append(facts) or command.DatasetCard("---\nlicense: mit\n---\n")
    assert annotate(annotator, tmp_path / "out", **options) == "https://hub/datasets/it"
    assert [names for names, _ in pushes] == [
        ["train-000000.parquet", "train-000001.parquet"], ["train-000002.parquet"],
    ]  # fmt: skip
    assert [kwargs["delete_patterns"] for _, kwargs in pushes] == ["data/*.parquet", None]
    assert [facts.rows for facts in cards] == [4, 4, 5, 5] and cards[-1].licenses == {"MIT": 5}
    assert cards[-1].latents == sum(e["latents"] for e in entries(tmp_path / "out"))
    assert annotate(annotator, tmp_path / "out", **options) is None and len(pushes) == 2


def test_the_command_in_jobs(tiny_model, tokenizers, tmp_path, capsys):
    """`--shard I/N` of one folder, the same command again, a changed checkpoint, and what is refused."""
    tokenizer = tokenizers["newline_indent"]
    tiny_model("llama", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    CORPUS.to_json(tmp_path / "rows.jsonl")
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    argv = ["annotate", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl"), *flags]
    one, two = [*argv, "--output_dir", str(tmp_path / "one")], [*argv, "--output_dir", str(tmp_path / "two")]
    assert ra3(one) == 0
    assert "5 documents, " in (said := capsys.readouterr().out) and "in 5 files." in said
    assert [ra3([*two, "--shard", f"{i}/2"]) for i in range(2)] == [0, 0]
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert ra3([*one, "--streaming"]) == 2 and "whose `rows` is 5" in capsys.readouterr().err
    assert ra3([*argv, "--output_dir", str(tmp_path / "stream"), "--streaming"]) == 0
    assert rows(tmp_path / "stream") == rows(tmp_path / "one") and len(files(tmp_path / "stream")) == 1
    before = files(tmp_path / "one")
    assert ra3([*one, "--num_latents", "3"]) == 2 and "`num_latents` 2, and now it is 3" in capsys.readouterr().err
    model = tiny_model("llama", tokenizer)
    next(model.parameters()).data.fill_(0.5)
    model.save_pretrained(tmp_path / "model")
    assert ra3(one) == 2 and "weights or tokenizer have changed" in capsys.readouterr().err
    assert files(tmp_path / "one") == before
    for shard in ("2/2", "1", "-1/2", "0/0"):
        assert ra3([*one, f"--shard={shard}"]) == 2 and f"`shard` is '{shard}'" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"text": "x = 1\\n"}\n{"text": "y\n')
    argv[3] = str(tmp_path / "bad.jsonl")
    assert ra3([*argv, "--output_dir", str(tmp_path / "bad")]) == 2
    assert "`dataset_name` is" in (said := capsys.readouterr().err) and "can't be read" in said
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_accelerate_launches_two_processes(tiny_model, tokenizers, tmp_path):
    """One of them fails at a shard, waits for the other and says so; the other shards are those of one process."""
    tokenizer = tokenizers["newline_indent"]
    tiny_model("llama", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    broken_corpus().to_json(tmp_path / "rows.jsonl")
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    argv = [str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl"), *flags, "--output_dir"]
    launch = ["-m", "accelerate.commands.launch", "--config_file",
              str(ROOT / "examples" / "accelerate_configs" / "multi_process.yaml"), "-m"]  # fmt: skip
    command = ["ra3_trl.cli.annotate", *argv, str(tmp_path / "two")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, *launch, *command], env=env, capture_output=True, text=True)
    assert ran.returncode and "shard 1: row 1: `text` is None" in ran.stderr
    assert ra3(["annotate", *argv, str(tmp_path / "one")]) == 2
    assert files(tmp_path / "two") == files(tmp_path / "one") and len(files(tmp_path / "two")) == 4
    ran = subprocess.run([sys.executable, *launch, *command, "--skip_broken_rows"], env=env, capture_output=True)
    assert ran.returncode == 0 and [row["stars"] for row in rows(tmp_path / "two")] == [0, 2, 3, 4]
