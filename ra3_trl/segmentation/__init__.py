"""Text -> actions (lines) -> token boundaries."""

from .corpus import load_code_directory, standard_library
from .datasets import (
    FEATURES,
    ROW,
    as_dataset,
    content_id,
    count_documents,
    cut_example,
    document_to_row,
    row_to_document,
    segment_dataset,
)
from .documents import Segmenter, Tokens, splice
from .examples import RowForms, RowReader, Text
from .fences import PYTHON_NAMES, Fence, find_fences
from .format import (
    ACTION_FORMATS,
    MARKDOWN,
    PROSE,
    PYTHON,
    PYTHON_TAGS,
    SLASHES,
    TAGS,
    ActionFormat,
    find_format,
    tagged,
)
from .lines import Line
from .python import OwnLineComment, count_code_lines, own_line_comments, statements_end
from .tokens import FragmentEncoder, build_token_table, prompt_ids, readable_bytes, require_tags, token_bytes


__all__ = [
    "ACTION_FORMATS",
    "MARKDOWN",
    "PROSE",
    "PYTHON",
    "PYTHON_NAMES",
    "PYTHON_TAGS",
    "SLASHES",
    "TAGS",
    "ActionFormat",
    "FEATURES",
    "Fence",
    "FragmentEncoder",
    "Line",
    "OwnLineComment",
    "ROW",
    "RowForms",
    "RowReader",
    "Segmenter",
    "Text",
    "Tokens",
    "as_dataset",
    "build_token_table",
    "content_id",
    "count_code_lines",
    "count_documents",
    "cut_example",
    "document_to_row",
    "find_fences",
    "find_format",
    "load_code_directory",
    "own_line_comments",
    "prompt_ids",
    "readable_bytes",
    "require_tags",
    "row_to_document",
    "segment_dataset",
    "splice",
    "standard_library",
    "statements_end",
    "tagged",
    "token_bytes",
]
