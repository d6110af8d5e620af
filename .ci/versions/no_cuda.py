"""PyPI's CUDA builds of torch on a machine without CUDA: its gigabytes of libraries are replaced by one of stubs.

`import torch` needs these libraries and their symbols, and calls none of them but the CUDA runtime, which is small and
stays. This is for tests on a CPU only.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path


NO_DEVICE = 100  # cudaErrorNoDevice, should anything be called


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def stand_in_for_cuda(python: Path) -> None:
    """Writes the stubs into the `torch/lib` of an environment; does nothing for a CPU build of torch."""
    (lib,) = python.parents[1].glob("lib/python3*/site-packages/torch/lib")
    theirs = [path for pattern in ("lib*torch*.so", "libc10*.so") for path in sorted(lib.glob(pattern))]
    needed = {
        name
        for path in theirs
        for name in re.findall(r"NEEDED.*\[(lib(?:cu|nv|nccl).*)\]", _output("readelf", "-d", path))
    }
    missing = sorted(needed - {path.name for path in lib.parents[1].glob("nvidia/**/lib*.so*")})
    if not missing:
        return
    symbols: dict[str, set[str]] = defaultdict(set)  # by version, which is the library's name or nothing
    for path in theirs:
        listed = _output("nm", "--dynamic", "--undefined-only", "--with-symbol-versions", path)
        for symbol, version in re.findall(r" U ((?:cu|nv|nccl)[^@\s]*)@?(\S*)", listed):
            symbols[version].add(symbol)
    for name in needed - set(missing):
        symbols.pop(name, None)
    source = "".join(
        f"int {symbol}(void) {{ return {NO_DEVICE}; }}\n" for symbol in sorted(set().union(*symbols.values()))
    )
    symbols.pop("", None)  # without a version they need no line in the linker's script
    with tempfile.NamedTemporaryFile("w", suffix=".map") as script:
        script.write(
            "".join(f"{version} {{ {'; '.join(sorted(listed))}; }};\n" for version, listed in symbols.items())
        )
        script.flush()
        command = ["gcc", "-w", "-fno-builtin", "-shared", "-fPIC", f"-Wl,--version-script={script.name}"]
        stub = lib / "libno_cuda.so"
        subprocess.run([*command, "-x", "c", "-", "-o", stub], input=source, text=True, check=True)
    for name in missing:
        (lib / name).symlink_to(stub.name)
