"""C, C++, C#, Go, Java, JavaScript, Kotlin, Rust, Swift and TypeScript -> lines; their comments begin with `//`.

A text does not say which of them it is in, so it is read as each in turn. A reading that meets an open string or
comment is none; a boundary stands only where all the others agree that code begins. As the right one is among them,
a comment line is never put into a string, whatever the wrong ones make of the text. (Pygments would have to be told
the language, lexes leniently and puts no bracket into relation to another; what is asked here is less.)

Text with JSX (in whose markup `//` is text) and with cgo (where comments are code) is left to plain next-token
training. Where no language of the list has it, such as `/.../` in Swift or `?>` in PHP, a construct is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from .lines import Line


# What is not code, by name: what a text must hold for it to matter, and its pattern. Of `nested`, `template`, `markup`
# and `slash` that is the opening only; `_Reading` goes on from there.
_ESCAPE = r"\\(?:\r\n|[\s\S])"
_PARTS = {
    "spliced": (r"\\[ \t]*\r?\n", r"//(?:\\[ \t]*\r?\n|[^\n])*"),  # C: a backslash carries a comment to the next line
    "comment": (r"//", r"//[^\n\u2028\u2029]*"),
    "nested": (r"/\*(?:(?!\*/)[\s\S])*/\*", r"/\*"),
    "block": (r"/\*", r"/\*[\s\S]*?\*/"),
    "message": (r"#[ \t]*(?:error|warning|\w*region)", r"#[ \t]*(?:error|warning|region|endregion)\b[^\n]*"),
    "number": (r"\d'", r"(?<!\w)\d(?:'?[\w.])*"),  # C++: 1'000
    "cpp_raw": (r'R"', r'(?<!\w)(?:u8|[uUL])?R"(?P<c>[^\s()\\"]{0,16})\([\s\S]*?\)(?P=c)"'),
    "java_text": (r'"""', rf'"""(?:{_ESCAPE}|[^"\\]|"(?!""))*"""'),
    "kotlin_text": (r'"""', r'"""[\s\S]*?"{3,}'),
    "sharp_text": (r'"""', r'(?P<q>"{3,})(?!")[\s\S]*?(?<!")(?P=q)(?!")'),
    "verbatim": (r'@\$?"', r'(?:@\$?|\$@)"(?:""|[^"])*"'),
    "swift_raw": (r'#"', r'(?P<h>#+)"(?:""[\s\S]*?""|[^\n]*?)"(?P=h)'),
    "rust_raw": (r'r#*"', r'(?<!\w)[bc]?r(?P<r>#*)"[\s\S]*?"(?P=r)'),
    "rust_string": (r'"', rf'"(?:{_ESCAPE}|[^"\\])*"'),
    "rust_quote": (r"'", r"'(?:\\(?:u\{[^}\n]*\}|x..|.)|[^\\'\n])'|'[^\W\d]\w*"),  # a character or a lifetime
    "string": (r'"', rf'"(?:{_ESCAPE}|[^"\\\n])*"'),
    "quote": (r"'", rf"'(?:{_ESCAPE}|[^'\\\n])*'"),
    "go_raw": (r"`", r"`[^`]*`"),
    "name": (r"`", r"`[^`\n]*`"),
    "template": (r"`", r"`"),
    "markup": (r"</|/>", r"<(?=[A-Za-z_>])"),
    "slash": (r"(?:^|[^/*])/[^/*]", r"/"),
}
_READINGS = (  # the parts that a language has, in the order in which they are tried
    ("spliced", "comment", "block", "message", "number", "cpp_raw", "string", "quote"),  # C, C++
    ("comment", "block", "java_text", "string", "quote"),  # Java
    ("comment", "block", "message", "sharp_text", "verbatim", "string", "quote"),  # C#
    ("comment", "block", "string", "quote", "go_raw"),  # Go
    ("comment", "nested", "block", "rust_raw", "rust_string", "rust_quote"),  # Rust
    ("comment", "nested", "block", "kotlin_text", "string", "quote", "name"),  # Kotlin
    ("comment", "nested", "block", "swift_raw", "java_text", "string", "name"),  # Swift
    ("comment", "block", "string", "quote", "template", "markup", "slash"),  # JavaScript, TypeScript
)
_COMMENTS = ("spliced", "comment", "block", "nested")
_CODE = r"(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<newline>\n)|(?P<stray>[\"'`]|/\*)"

_NEST = re.compile(r"/\*|\*/")
_TEMPLATE = re.compile(rf"(?:{_ESCAPE}|\$(?!\{{)|[^`\\$])*(`|\$\{{)")
_REGEX = re.compile(r"/(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\[\n])+/\w*")
_OPERATOR = re.compile(
    r"(?<![.\w$])(?:return|typeof|case|in|of|delete|void|throw|new|do|else|instanceof|yield|await|default)$"
)
_HEADER = re.compile(r"(?<![.\w$])(?:if|while|for|with)(?:\s+await)?$")
_POSTFIX = re.compile(r"(?:\+\+|--|::|[\w$)\]]!)$")
_LABEL = re.compile(r"\s*(?:case\b.*|default\s*|public\s*|private\s*|protected\s*):$", re.DOTALL)
_DIRECTIVE = re.compile(r"//(?:go:|line |export |/\s*<|\s*(?:\+build|@ts-))")  # a comment that a tool obeys
_PAIRS = {")": "(", "]": "[", "}": "{"}
_BLANK = " \t\f\v\r"


class _Unsure(Exception):
    """Raised for a construct that is not read here: no reading can be trusted."""


@lru_cache(maxsize=256)
def _compiled(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join([*(f"(?P<{name}>{_PARTS[name][1]})" for name in names), _CODE]))


def _patterns(text: str) -> list[re.Pattern[str]]:
    """Lists the patterns to read `text` by; languages that differ in nothing that it holds are one."""
    matters = {name for name, (trigger, _) in _PARTS.items() if re.search(trigger, text)}
    return [_compiled(p) for p in dict.fromkeys(tuple(n for n in r if n in matters) for r in _READINGS)]


class _Reading:
    """Reads `text` as one language."""

    def __init__(self, text: str, pattern: re.Pattern[str]):
        self.text = text
        self.lines: dict[int, tuple[str, int]] = {0: ("", 0)}  # start of code -> innermost bracket, end of code before
        self.failed = False  # whether it can't be that language
        self._open: list[tuple[str, bool]] = []  # brackets, and whether one is that of `if (` and the like
        self._headers: set[int] = set()  # ends of such brackets
        self._end = 0  # of the code so far
        at = text.index("\n") if text.startswith("#!/") and "\n" in text else 0
        while not self.failed and (match := pattern.search(text, at)):
            code = text[at : match.start()].rstrip()
            self._end = at + len(code) if code else self._end
            at = self._step(match.lastgroup or "", match)

    def _step(self, kind: str, match: re.Match[str]) -> int:
        """Takes one token, and says where to go on."""
        end = match.end()
        if kind == "newline":  # a line begins, unless a backslash carries this one on
            row = self.text[self.text.rfind("\n", 0, match.start()) + 1 : match.start()]
            if not row.rstrip(_BLANK).endswith("\\"):
                self.lines[end] = (self._open[-1][0] if self._open else "", self._end)
            return end
        if kind == "nested":
            end = self._after_nested(end)
        elif kind == "stray":
            self.failed = True
        elif kind == "markup":
            if self._operand_follows():
                raise _Unsure
        elif kind == "slash":
            end = self._after_slash(match.start())
        elif kind == "open":
            self._open.append((match[0], _HEADER.search(self.text, max(0, self._end - 16), self._end) is not None))
        elif kind == "template" or (match[0] == "}" and self._open and self._open[-1][0] == "${"):
            end = self._after_template(end, kind)
        elif kind == "close":
            self._close(match[0], end)
        if kind not in _COMMENTS:
            self._end = end
        return end

    def _close(self, bracket: str, end: int) -> None:
        """Closes a bracket; one that closes none is let be: with `#if` in C they need not match, without harm."""
        opened = _PAIRS[bracket]
        if opened in [b for b, _ in self._open]:
            while self._open[-1][0] != opened:
                self._open.pop()
            if self._open.pop()[1]:
                self._headers.add(end)

    def _after_nested(self, at: int) -> int:
        depth = 1
        for match in _NEST.finditer(self.text, at):
            depth += 1 if match[0] == "/*" else -1
            if not depth:
                return match.end()
        self.failed = True
        return at

    def _after_template(self, at: int, kind: str) -> int:
        """Goes from "`" or the `}` of a `${` to the end of the template or its next `${`."""
        if kind == "close":
            self._open.pop()
        match = _TEMPLATE.match(self.text, at)
        if match is None:
            self.failed = True
            return at
        if match[1] == "${":
            self._open.append(("${", False))
        return match.end()

    def _operand_follows(self) -> bool:
        """Tells whether JavaScript wants a value next, so that `/` opens a regular expression and `<` markup."""
        text, end = self.text, self._end
        near = max(0, end - 16)
        if end in self._headers or _OPERATOR.search(text, near, end):
            return True
        last = text[end - 1 : end]
        return not (last.isalnum() or last in tuple("_$)].\"'`") or _POSTFIX.search(text, near, end))

    def _after_slash(self, at: int) -> int:
        if not self._operand_follows():
            return at + 1
        literal = _REGEX.match(self.text, at)
        if self.text[self._end - 1 : self._end] != "}":
            self.failed = literal is None
            return literal.end() if literal else at
        if literal and set("\"'`(){}[]") & set(literal[0]):  # after a block an expression, after an object a division
            raise _Unsure
        return at + 1


def _code_lines(text: str) -> dict[int, list[tuple[str, int]]] | None:
    """Maps the starts of lines that are code in all readings to what each says of them; `None` without a reading."""
    if "\0" in text or "\r" in text.replace("\r\n", "") or re.search(r'^\s*import\s+"C"', text, re.MULTILINE):
        return None
    try:
        readings = [r.lines for r in (_Reading(text, p) for p in _patterns(text)) if not r.failed]
    except _Unsure:
        return None
    if not readings:
        return None
    return {start: [r[start] for r in readings] for start in sorted(set.intersection(*map(set, readings)))}


def _rows(text: str) -> Iterator[tuple[int, str]]:
    """Lists physical lines without their newlines and a byte-order mark, and where they start."""
    start = 0
    for row in text.split("\n"):
        yield start, row.removeprefix("\ufeff") if start == 0 else row
        start += len(row) + 1


def segment_slashes(text: str) -> tuple[Line, ...] | None:
    r"""Cuts `text` into lines and own-line comments; `None` when it can be read in none of the languages.

    A line whose innermost open bracket is `(` or `[` continues the one before. Expected is the indentation of the line
    before, one unit deeper after `{`, `case ...:` and the like.

    >>> [(line.start, line.comment) for line in segment_slashes("if (x) {\n  // why\n  f(\n1);\n")]
    [(0, False), (9, True), (18, False)]
    """
    code = _code_lines(text)
    if code is None:
        return None
    lines: list[Line] = []
    before, indent, unit = 0, "", "    "
    for start, row in _rows(text):
        body, readings = row.lstrip(_BLANK), code.get(start)
        if not body or not readings or any(bracket in ("(", "[", "${") for bracket, _ in readings):
            continue
        end = readings[0][1]
        opens = text[end - 1 : end] == "{" or bool(_LABEL.match(text[before:end]))
        comment = body.startswith("//") or (start == 0 and body.startswith("#!/"))
        marked = text.startswith("\ufeff", start)  # behind a byte-order mark, which must stay the first
        lines.append(Line(start, text.index(body, start), indent + unit * opens, comment, latent=not marked))
        if not comment:
            before, outer, indent = start, indent, row[: len(row) - len(body)]
            if opens and len(indent) > len(outer) and indent.startswith(outer):
                unit = indent[len(outer) :]
    return tuple(lines)


def strip_slashes(text: str, after: int = 0) -> str:
    r"""Strips the own-line comments that begin at or after character `after`.

    Those that a compiler obeys (`//go:build`, `/// <reference`) stay. Text that can't be read is returned as it is.

    >>> strip_slashes("//go:build linux\n// why\nx := 1\n")
    '//go:build linux\nx := 1\n'
    """
    code, kept = _code_lines(text) or {}, []
    for start, row in _rows(text):
        body = row.strip(_BLANK)
        comment = start in code and start >= after and body.startswith("//")
        if not comment or body.endswith("\\") or _DIRECTIVE.match(body):
            kept.append(row)
    return ("\ufeff" if text.startswith("\ufeff") else "") + "\n".join(kept)
