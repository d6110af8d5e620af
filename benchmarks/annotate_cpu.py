"""`ra3 annotate` whose manifest has CPU seconds in the place of the wall's, for `--clock cpu`."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

from ra3_trl.cli.annotate import main
from ra3_trl.hub import shards


if __name__ == "__main__":
    shards.time = SimpleNamespace(perf_counter=time.process_time, time=time.time, sleep=time.sleep)
    raise SystemExit(main(sys.argv[1:]))
