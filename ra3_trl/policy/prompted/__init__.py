"""Annotators that are asked: a language model sees a text with numbered lines and answers with lines and comments."""

from .annotator import Answer, Cost, LanguageModel, ModelAnnotator
from .answers import read_answer
from .local import LocalModel
from .prompt import Prompt
from .server import AnnotatorError, ChatServer
from .settings import AskingSettings


__all__ = [
    "AnnotatorError",
    "Answer",
    "AskingSettings",
    "ChatServer",
    "Cost",
    "LanguageModel",
    "LocalModel",
    "ModelAnnotator",
    "Prompt",
    "read_answer",
]
