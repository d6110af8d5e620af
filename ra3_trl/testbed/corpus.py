"""Programs with lines that a tiny model can state only after a comment in steps.

A stanza is three lines: an expression in serial operations, the hard line that states its value, and an easy line.

    c=(7*4+9-2)%10
    #7*4=8+9=7-2=5
    assert c==5
    d=3

All of it is Python and true: only the first operation may be a product, so that Python's order of operations is left
to right, and `%10` of the whole is that of each step (the comment's steps are modulo 10, `7*4=8`). The last two
operands are uniform, and so is the value: who does not calculate is right in one case of ten. The expert's programs
have no comments. The pre-training corpus has some: before hard lines in steps, before easy lines a single digit that
says nothing. A wrong comment has one wrong step and goes on from it; the line after it is true all the same.

With predicates a stanza has three hard lines, which together tell the value and share one comment:

    c=(7*4+9-2)%10
    #7*4=8+9=7-2=5
    assert c>4
    assert c%2==1
    assert c%3==2
    d=3

The first is a coin's toss for who does not calculate (log 2 = 0.69 nats), and so nearly are the others after it (0.67
and 0.94 nats): it takes all three to be worth the 2.3 nats of a value.

Everything is drawn from `random.Random(seed)`; `content_hash` of a data set is frozen in `tests/test_replication.py`.
"""

from __future__ import annotations

import hashlib
import math
import operator
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


MODULUS = 10
NAMES = "abcdef"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
WORDS = ("assert ", "==", "=(", ")%10")
FILL = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")  # of corpora with texts written for filling in the middle
KNOWN_LINES = 1  # that stand behind the middle
COMPARISONS = ("%", ">", "<")  # of predicates; a corpus without them has a vocabulary without them
_OPERATIONS = {"*": operator.mul, "+": operator.add, "-": operator.sub}


@dataclass(frozen=True)
class Corpus:
    """How the testbed's programs are written.

    Args:
        stanzas (`int`, *optional*, defaults to `6`):
            Stanzas of a program.
        operations (`int`, *optional*, defaults to `3`):
            Serial operations of an expression.
        hard_rate, easy_rate (`float`, *optional*, defaults to `0`):
            Share of hard and of easy lines with a comment before them; 0 is the expert.
        right (`float`, *optional*, defaults to `1`):
            Share of the comments before hard lines whose steps are all right.
        predicates (`bool`, *optional*, defaults to `False`):
            Whether a stanza has three hard lines that share a comment, in the place of one that states the value.
        useless (`float`, *optional*, defaults to `0`):
            Share of the comments before hard lines that are a single digit, as those before easy lines are.
        filled (`float`, *optional*, defaults to `0`):
            Share of the texts that are written for filling in the middle, the comment between a program's beginning
            and the lines that follow it; it is right whatever `right` says of the others.
    """

    stanzas: int = 6
    operations: int = 3
    hard_rate: float = 0.0
    easy_rate: float = 0.0
    right: float = 1.0
    predicates: bool = False
    useless: float = 0.0
    filled: float = 0.0
    version: int = 1

    @property
    def hard_lines(self) -> int:
        """Hard lines of a stanza."""
        return 3 if self.predicates else 1


@dataclass(frozen=True)
class Example:
    """A verifiable task: `d=3\\nc=(7*4+9-2)%10\\n`, its only right line `assert c==5`, and the right comment.

    With predicates the answer is all three lines."""

    prompt: str
    answer: str
    comment: str


def make_tokenizer(corpus: Corpus | None = None) -> PreTrainedTokenizerFast:
    """Characters, but for `WORDS`, which are one token each; BOS in front, as Llama has it."""
    pieces = (BOS, EOS, PAD, "\n", "#", "=", *_OPERATIONS, *NAMES, *map(str, range(MODULUS)), *WORDS)
    pieces += COMPARISONS if corpus is not None and corpus.predicates else ()
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"assert |==|=\(|\)%10|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    further = list(FILL) if corpus is not None and corpus.filled else []
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, additional_special_tokens=further
    )


def expression(rng: random.Random, operations: int) -> tuple[list[str], list[int]]:
    """Operands and operators in turn, and the values after each operation: `7 * 4 + 9 - 2` and 8, 7, 5."""
    parts = [str(rng.randrange(MODULUS))]
    for k in range(operations):
        parts += [rng.choice("*+-" if k == 0 else "+-"), str(rng.randrange(MODULUS))]
    return parts, values_of(parts)


def values_of(parts: list[str], slip: int = -1, by: int = 0) -> list[int]:
    """Values after each operation; the result of operation `slip` is wrong `by` so much."""
    values = [int(parts[0])]
    for k, (symbol, operand) in enumerate(zip(parts[1::2], parts[2::2], strict=True)):
        exact = _OPERATIONS[symbol](values[-1], int(operand)) + (by if k == slip else 0)
        values.append(exact % MODULUS)
    return values[1:]


def steps(parts: list[str], values: list[int]) -> str:
    """The comment that calculates: `#7*4=8+9=7-2=5`."""
    rest = "".join(f"{s}{o}={v}" for s, o, v in zip(parts[1::2], parts[2::2], values, strict=True))
    return f"#{parts[0]}{rest}"


def hard_lines(name: str, value: int, corpus: Corpus) -> list[str]:
    """What is said of the value: that it is 5; or that it is above 4, odd, and 2 modulo 3."""
    if not corpus.predicates:
        return [f"assert {name}=={value}"]
    half = f"assert {name}>4" if value > 4 else f"assert {name}<5"
    return [half, f"assert {name}%2=={value % 2}", f"assert {name}%3=={value % 3}"]


def stanza(rng: random.Random, corpus: Corpus) -> list[str]:
    """Expression, hard lines and easy line, each but the later hard ones perhaps with a comment before it."""
    name, other = rng.sample(NAMES, 2)
    parts, values = expression(rng, corpus.operations)
    definition = f"{name}=({''.join(parts)})%{MODULUS}"
    lines = [*_useless(rng, corpus), definition]
    if rng.random() < corpus.hard_rate:
        if corpus.useless and rng.random() < corpus.useless:
            lines.append(f"#{rng.randrange(MODULUS)}")
        else:
            said = values
            if rng.random() >= corpus.right:
                said = values_of(parts, rng.randrange(corpus.operations), rng.randrange(1, MODULUS))
            lines.append(steps(parts, said))
    lines += hard_lines(name, values[-1], corpus)
    return [*lines, *_useless(rng, corpus), f"{other}={rng.randrange(MODULUS)}"]


def _useless(rng: random.Random, corpus: Corpus) -> list[str]:
    return [f"#{rng.randrange(MODULUS)}"] if rng.random() < corpus.easy_rate else []


def program(rng: random.Random, corpus: Corpus) -> str:
    lines = [line for _ in range(corpus.stanzas) for line in stanza(rng, corpus)]
    return "\n".join(lines) + "\n"


def filled(rng: random.Random, corpus: Corpus) -> str:
    """A program's beginning, the next lines and the comment between them: `<fim_prefix>`, `c=(7*4+9-2)%10`, `#`,
    `<fim_suffix>`, `assert c==5`, `<fim_middle>`, `7*4=8+9=7-2=5`; before an easy line a digit."""
    plain = replace(corpus, hard_rate=0.0, easy_rate=0.0)
    lines = [line for _ in range(corpus.stanzas) for line in stanza(rng, plain)]
    places = [i for i, line in enumerate(lines) if i and (is_hard(line) or rng.random() < 1 / 3)]
    at = rng.choice(places)
    comment = str(rng.randrange(MODULUS))
    if is_hard(lines[at]):
        parts = list(lines[at - 1][len("c=(") : -len(")%10")])
        comment = steps(parts, values_of(parts))[1:]
    before, after = ("".join(f"{line}\n" for line in part) for part in (lines[:at], lines[at : at + KNOWN_LINES]))
    return f"{FILL[0]}{before}#{FILL[1]}\n{after}{FILL[2]}{comment}\n"


def fillings(corpus: Corpus, seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Such texts up to the comment before a hard line, and the comment that is right, without its `#`."""
    rng = random.Random(seed)
    while count:
        prompt, comment = filled(rng, corpus).removesuffix("\n").split(FILL[2])
        if "=" in comment:
            count -= 1
            yield prompt + FILL[2], comment


def programs(corpus: Corpus, seed: int, count: int) -> Dataset:
    """A data set with a column `text`, one program a row."""
    rng = random.Random(seed)

    def text() -> str:
        return filled(rng, corpus) if corpus.filled and rng.random() < corpus.filled else program(rng, corpus)

    return Dataset.from_dict({"text": [text() for _ in range(count)]})


def examples(corpus: Corpus, seed: int, count: int) -> Iterator[Example]:
    """Programs cut before their last stanza's hard lines."""
    rng = random.Random(seed)
    for _ in range(count):
        *lines, _ = program(rng, corpus).splitlines()
        before, answer = lines[: -corpus.hard_lines], lines[-corpus.hard_lines :]
        parts = list(before[-1][len("c=(") : -len(")%10")])
        yield Example("\n".join(before) + "\n", "\n".join(answer), steps(parts, values_of(parts)))


def tasks(corpus: Corpus, seed: int, count: int, opening: str = "") -> Dataset:
    """Verifiable tasks for RLVR, columns `prompt`, `answer` and `opening`, of the expert's programs.

    `opening` stands at each prompt's end and is read as the completion's beginning: the think prefix forces a comment.
    """
    rows = list(examples(corpus, seed, count))
    prompts, answers = [row.prompt + opening for row in rows], [row.answer for row in rows]
    return Dataset.from_dict({"prompt": prompts, "answer": answers, "opening": [opening] * count})


def boundaries(corpus: Corpus) -> int:
    """Places for a comment in a program without any: before each line."""
    return (2 + corpus.hard_lines) * corpus.stanzas


def is_hard(line: str) -> bool:
    return line.startswith("assert ")


def code_lines(completion: str, count: int = 1) -> str | None:
    """The first `count` whole lines of a completion that are no comments; `None` if it ends before them."""
    code = [line for line in completion.split("\n")[:-1] if not line.startswith("#")]
    return "\n".join(code[:count]) if len(code) >= count else None


def comments_before(completion: str, count: int) -> list[str]:
    """The comments before a completion's first `count` lines of code are done; all where it has fewer."""
    found: list[str] = []
    for line in completion.split("\n")[:-1]:
        if line.startswith("#"):
            found.append(line)
        elif (count := count - 1) == 0:
            break
    return found


def is_right(completion: str, answer: str) -> bool:
    """Whether the first lines of code are the expert's, letter by letter."""
    return code_lines(completion, 1 + answer.count("\n")) == answer


def right_line(completions: list[str], answer: list[str], opening: list[str], **kwargs) -> list[float]:
    """TRL reward: 1 if the first line of code is the expert's ([`is_right`]).

    A plain function for speed. Of an assertion about the name asked for, running prompt and line says the same, since
    the line is true in Python for one value only; but a sandbox would also pass a line that asserts nothing, such as
    `d=3`, and fail a right line for a completion that is cut off behind it.
    """
    rows = zip(opening, completions, answer, strict=True)
    return [float(is_right(begun + text, line)) for begun, text, line in rows]


def floor(corpus: Corpus) -> float:
    """Cross-entropy of the expert's programs in nats per token for one who knows their distribution and calculates;
    tokens of newlines and the end of the text count, which this one knows."""
    digits = corpus.operations + 1 + 1  # operands, and the easy line's value
    choices = math.log(len(NAMES)) + math.log(len(NAMES) - 1) + digits * math.log(MODULUS)
    choices += math.log(3) + (corpus.operations - 1) * math.log(2)
    # c=(7*4+9-2)%10, assert c==5 or assert c>4, assert c%2==1 and assert c%3==2, d=3, each with its newline
    tokens = (2 * corpus.operations + 1 + 4) + (5 + 7 + 7 if corpus.predicates else 5) + 4
    return corpus.stanzas * choices / (corpus.stanzas * tokens + 1)  # and the end of the text


def content_hash(data: Dataset) -> str:
    """A hash of all cells of a data set, by which its generator is frozen."""
    digest = hashlib.sha256()
    for column in sorted(data.column_names):
        for cell in data[column]:
            digest.update(f"{column}\0{cell}\0".encode())
    return digest.hexdigest()[:16]
