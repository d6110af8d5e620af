"""What runs inside the sandbox: a program with its calls, watched line by line.

Imports nothing but what an interpreter has begun with. Reads `[text, calls]` from standard input and prints rows of
fields:

    assert LINE HOLDS ASKED CHANGES [AT NAME VALUE] ...    an `assert` of the text, by the line where it begins
    call NUMBER LINE ASKED CHANGES [AT NAME VALUE] ...     a call, by the line at which its function returned
    fails                                                  a call that raised
    end WHY                                                nothing, an exception's name, or `steps`

`HOLDS`: whether the assertion held, each time. `ASKED`: whether clocks, random numbers or addresses were asked for.
`CHANGES`: how many there were; the first and the last follow, each with the line that made it (0: an argument).
"""

from __future__ import annotations

import os
import sys


TYPE_CHECKING = False  # of `typing`, which is not needed
if TYPE_CHECKING:
    from typing import Any, NoReturn


ONLY_AST = 0x400  # of `compile`
STEPS = 10_000  # lines, and calls of functions in C
TOLD = 200  # first and last changes of a trace
WIDE = 40  # characters of a value; a longer one is not shown
DEEP = 4
PROGRAM, CALL = "<program>", "<call>"
_ASKED = {
    "time": ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time",
             "process_time_ns", "thread_time", "thread_time_ns", "clock_gettime", "clock_gettime_ns", "localtime",
             "gmtime", "ctime", "asctime", "strftime"),
    "posix": ("urandom", "getrandom", "getpid", "times", "getloadavg"),
    "resource": ("getrusage",),
    "builtins": ("input",),
    "_uuid": ("generate_time_safe",),
}  # fmt: skip
# Asked for by the program's own lines only: Python's modules use them where nothing of it shows, `copy.deepcopy` say.
_ASKED_BY_LINES = {
    "builtins": ("id", "hash"),
    "posix": ("stat", "lstat", "fstat"),
    "_thread": ("get_ident", "get_native_id"),
    "gc": ("get_count", "get_stats"),
}
_FIXED = (int, float, complex, str, bytes, bool, type(None))  # the same object is the same value
_DRAWN = ("random", "getrandbits", "randbytes")
_NOW = ("now", "utcnow", "today")


def show(value: Any, room: int = WIDE, depth: int = 0) -> str | None:
    """The value as Python writes it, `None` where it is no plain value or longer than `room`. Sets are sorted: what
    order they come in is not theirs."""
    kind, text = type(value), None
    if value is None or kind is bool or kind in (float, complex):
        text = repr(value)
    elif kind is int:
        text = repr(value) if value.bit_length() < 4 * room else None
    elif kind in (str, bytes):
        text = repr(value) if len(value) <= room else None
    elif kind in (list, tuple, set, frozenset, dict) or kind.__module__ == "collections":
        text = _show_many(value, kind, room, depth)
    else:
        return None
    return text if text is not None and len(text) <= room and text.isprintable() else None


def _show_many(value: Any, kind: type[Any], room: int, depth: int) -> str | None:
    mapping = issubclass(kind, dict)
    if depth > DEEP or not (mapping or kind.__name__ == "deque" or kind.__module__ == "builtins"):
        return None
    if 3 * len(value) > room:  # items of a character, and what stands between them
        return None
    items = []
    for item in list(dict.items(value) if mapping else value):
        parts = [show(part, room, depth + 1) for part in (item if mapping else (item,))]
        if None in parts:
            return None
        items.append(": ".join(map(str, parts)))
    if issubclass(kind, (set, frozenset)):
        items.sort(key=lambda text: (len(text), text))
    inner = ", ".join(items)
    if kind is tuple:
        return f"({inner},)" if len(items) == 1 else f"({inner})"
    if kind is list:
        return f"[{inner}]"
    if kind is frozenset or kind is set and not items:
        return f"{kind.__name__}({{{inner}}})" if items else f"{kind.__name__}()"
    plain = f"{{{inner}}}" if mapping or kind is set else f"[{inner}]"
    return plain if kind in (dict, set) or kind.__name__ == "defaultdict" else f"{kind.__name__}({plain})"


class Map:
    """What the text's own nodes say: the line where each `assert` begins, by all of its lines; a function's variables,
    by its name and first line. Those of a comprehension are not the function's, whichever Python runs it."""

    def __init__(self, tree: Any):
        self.asserts: dict[int, int] = {}
        self.variables: dict[tuple[str, int], dict[str, None]] = {}
        self.elsewhere: list[tuple[dict[str, None], str]] = []
        self._walk(tree, None)
        for names, name in self.elsewhere:
            names.pop(name, None)

    def _walk(self, node: Any, names: dict[str, None] | None) -> None:
        kind = type(node).__name__
        if kind == "Assert":
            for line in range(node.lineno, node.end_lineno + 1):
                self.asserts[line] = node.lineno
        elif kind in ("FunctionDef", "AsyncFunctionDef"):
            if names is not None:
                names[node.name] = None
            names = {}
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            self.variables[node.name, first] = names
        elif kind in ("Lambda", "ListComp", "SetComp", "DictComp", "GeneratorExp", "ClassDef"):
            names = None
        elif names is not None and kind == "arg":
            names[node.arg] = None
        elif names is not None and kind == "Name" and type(node.ctx).__name__ == "Store":
            names[node.id] = None
        elif names is not None and kind in ("ExceptHandler", "MatchAs", "MatchStar") and node.name:
            names[node.name] = None
        elif names is not None and kind in ("Nonlocal", "Global"):  # another function's, or none
            self.elsewhere += [(names, name) for name in node.names]
        for field in getattr(node, "_fields", ()):
            value = getattr(node, field, None)
            for part in value if type(value) is list else (value,):
                if hasattr(part, "_fields"):
                    self._walk(part, names)


class Trace:
    """Changes in their order: frame, line, name and value of each."""

    def __init__(self) -> None:
        self.changes: list[tuple[int, int, str, str]] = []
        self.count = 0

    def add(self, *change: Any) -> None:
        self.count += 1
        if len(self.changes) >= 2 * TOLD:
            del self.changes[TOLD]
        self.changes.append(change)

    def fields(self, without: int | None = None) -> list[Any]:
        told = [change[1:] for change in self.changes if change[0] != without]
        count = self.count - (len(self.changes) - len(told))
        return [count, *(part for change in told for part in change)]


class Watch:
    """The trace function: notes what changes in functions of the program, and at which assertion or call."""

    def __init__(self, where: Map, out: int):
        self.where, self.out = where, out
        self.steps = 0
        self.frames = 0
        self.imports = 0  # that are under way
        self.asked = False  # from then on, since a program may keep what it was answered
        self.trace, self.before = Trace(), Trace()  # since the assertion began, or ended; between the two
        self.open: list[Any] | None = None  # of the assertion that runs: its line, frame and whether it holds
        self.call: list[Any] | None = (
            None  # of the call that runs: its number, frame of its function, line at which that returned
        )
        self.pid = os.getpid()
        self.getpid, self.write = os.getpid, os.write

    def on_call(self, frame: Any, event: str, arg: Any) -> Any:
        code = frame.f_code
        if code.co_name == "_find_and_load" and code.co_filename == "<frozen importlib._bootstrap>":
            self.imports += 1
            return self.on_import
        self.step()
        if code.co_filename != PROGRAM or code.co_name.startswith("<") and code.co_name != "<module>":
            return None
        names = self.where.variables.get((code.co_name, code.co_firstlineno), ())
        seen: dict[str, str | None] = {}
        number, checks = self.frames, code.co_name.startswith(("<module>", "test", "check"))
        self.frames += 1
        entry = self.call is not None and self.call[1] is None
        if self.call is not None and entry:
            self.call[1] = number
            self.call[2] = 0 if code.co_name.startswith("test") else None  # what it asserts is told
        for name in names if event == "call" else ():
            if name in frame.f_locals:
                seen[name] = show(frame.f_locals[name])
                if entry and seen[name] is not None:
                    self.trace.add(number, 0, name, seen[name])
        left: list[bool] = []
        last: dict[str, Any] = {}
        at = [frame.f_lineno]

        def on_line(frame: Any, event: str, arg: Any) -> Any:
            self.step()
            values = frame.f_locals if names else {}
            for name in names:
                value = values.get(name, last)  # the dictionary itself is no value
                if value is last.get(name, last) and value is not last:
                    continue
                if type(value) in _FIXED:
                    last[name] = value
                else:
                    last.pop(name, None)
                told = None if value is last else show(value)
                if told is not None and told != seen.get(name):
                    self.trace.add(number, at[0], name, told)
                seen[name] = told
            if event == "exception" and self.open is not None and self.open[1] == number:
                self.open[2] = False
            if event == "exception":
                left.append(True)
            elif event == "line":
                left.clear()
                at[0] = frame.f_lineno
            if checks and event != "exception":
                self.at_line(frame.f_lineno if event == "line" else None, number)
            if event == "return" and self.call is not None and self.call[1] == number and self.call[2] is None:
                self.call[2] = 0 if left else frame.f_lineno
                self.call[3] = [int(self.asked), *self.trace.fields()]
            return on_line

        return on_line

    def at_line(self, line: int | None, number: int) -> None:
        """Closes the assertion that ran in this frame, and opens that of the line."""
        if self.open is not None and self.open[1] == number:
            begun, _, holds = self.open
            if line is not None and holds and self.where.asserts.get(line) == begun:
                return  # it has several lines
            fields = self.trace.fields(without=number)
            # One about a result that is at hand already runs nothing itself.
            fields = fields if fields[0] else self.before.fields(without=number)
            self.tell("assert", begun, int(holds), int(self.asked), *fields)
            self.open, self.trace = None, Trace()
        if line is not None and line in self.where.asserts and self.open is None:
            self.open = [self.where.asserts[line], number, True]
            self.before, self.trace = self.trace, Trace()

    def on_import(self, frame: Any, event: str, arg: Any) -> Any:
        """What a module takes and asks for while it is imported is not the program's affair."""
        if event == "return":
            self.imports -= 1
        return self.on_import

    def on_c_call(self, frame: Any, event: str, function: Any) -> None:
        if event != "c_call" or self.imports:
            return
        self.step()
        name, of = getattr(function, "__name__", ""), getattr(function, "__self__", sys)
        if type(of).__name__ != "module":
            asks = name in _DRAWN or name in _NOW
        else:
            by_program = frame.f_code.co_filename in (PROGRAM, CALL)
            asks = name in _ASKED.get(of.__name__, ()) or by_program and name in _ASKED_BY_LINES.get(of.__name__, ())
        self.asked = self.asked or asks

    def step(self) -> None:
        if self.imports:
            return
        self.steps += 1
        if self.steps > STEPS:
            self.end("steps")

    def end(self, why: str) -> NoReturn:
        """Prints what is finished and ends the process, whatever the program would do about it."""
        sys.settrace(None)
        sys.setprofile(None)
        self.tell("end", why)
        os._exit(0)

    def tell(self, *fields: Any) -> None:
        if self.getpid() != self.pid:  # forked by the program
            return
        data = ("\x1f".join(map(str, fields)) + "\n").encode("utf-8", "backslashreplace")
        while data:
            data = data[self.write(self.out, data) :]


def main() -> NoReturn:
    out, null = os.dup(1), os.open("/dev/null", os.O_RDWR)
    text, calls = eval(sys.stdin.read())
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.setrecursionlimit(1000)
    try:
        tree = compile(text, PROGRAM, "exec", ONLY_AST, True)
        code = compile(text, PROGRAM, "exec", 0, True)
        watch = Watch(Map(tree), out)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        Watch(Map(None), out).end(type(error).__name__)
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    why = run(watch, code, vars(module))
    for number, source in enumerate(calls):
        call: list[Any] = [number, None, None, ()]
        watch.trace, watch.call, watch.open = Trace(), call, None
        try:
            called = compile(source, CALL, "exec", 0, True)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        if run(watch, called, vars(module)):
            watch.tell("fails")
        elif call[2]:
            watch.tell("call", number, call[2], *call[3])
    watch.call = None
    watch.end(why)


def run(watch: Watch, code: Any, space: dict[str, Any]) -> str:
    """Runs code under watch; the name of what it raised, if anything."""
    sys.settrace(watch.on_call)
    sys.setprofile(watch.on_c_call)
    try:
        exec(code, space)
    except BaseException as error:
        return type(error).__name__
    finally:
        sys.settrace(None)
        sys.setprofile(None)
    return ""


if __name__ == "__main__":
    main()
