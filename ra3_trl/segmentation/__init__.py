"""Text -> actions (lines) -> token boundaries."""

from .corpus import load_code_directory, standard_library
from .datasets import count_documents, document_to_row, row_to_document, segment_dataset
from .documents import Segmenter, splice
from .format import ACTION_FORMATS, PYTHON, ActionFormat
from .tokens import FragmentEncoder, build_token_table, token_bytes


__all__ = [
    "ACTION_FORMATS",
    "PYTHON",
    "ActionFormat",
    "FragmentEncoder",
    "Segmenter",
    "build_token_table",
    "count_documents",
    "document_to_row",
    "load_code_directory",
    "row_to_document",
    "segment_dataset",
    "splice",
    "standard_library",
    "token_bytes",
]
