"""Runs programs that nobody trusts, and judges them by tests whose verdicts they can't forge."""

from .judge import VERDICTS, Judge, Problem, Result
from .sandbox import Limits, Sandbox, SandboxError


__all__ = ["VERDICTS", "Judge", "Limits", "Problem", "Result", "Sandbox", "SandboxError"]
