"""Execution traces as thoughts: what a function's variables really were, before the assertion about its result."""

from .annotator import TraceAnnotator
from .calls import calls_of
from .forms import FORMS, Change, Trace, write_trace
from .run import Traced, Tracer


__all__ = ["FORMS", "Change", "Trace", "TraceAnnotator", "Traced", "Tracer", "calls_of", "write_trace"]
