"""Whether this project can be installed beside others: uv resolves them together and installs nothing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from environments import CACHE, make_venv, resolve


SMALL = ("deepspeed", "bitsandbytes", "liger-kernel", "evalplus", "sentence-transformers")
SETS = (
    ("vllm==0.22.*",),
    ("vllm==0.31.*",),  # the newest that TRL 1.16 names
    ("vllm",),
    ("unsloth",),
    *((name,) for name in SMALL),
    ("lighteval",),
    ("lighteval", *SMALL),
    ("vllm", *SMALL),
    ("unsloth", *SMALL),
)
SHOWN = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface-hub")


def name_of(requirement: str) -> str:
    return re.split("[=<>!~]", requirement)[0]


def resolve_all() -> list[dict]:
    """Returns of each set the versions that go together, or uv's first words on why none do."""
    folder = CACHE / "resolve"
    python: Path = make_venv(folder, "3.12")
    rows = []
    for requirements in SETS:
        row: dict = {"beside": list(requirements)}
        try:
            chosen = dict(line.split("==") for line in resolve(python, list(requirements)))
            row["versions"] = {name: chosen[name] for name in (*map(name_of, requirements), *SHOWN)}
        except subprocess.CalledProcessError as error:
            row["conflict"] = " ".join(error.stderr.split())[:400]
        print(", ".join(requirements), "->", row.get("versions") or row["conflict"], flush=True)
        rows.append(row)
    return rows
