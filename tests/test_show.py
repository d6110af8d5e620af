"""`ra3 show`: where boundaries stand in a file, what is printed, and the page in a headless Chromium."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import time
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

from ra3_trl import Policy, RA3Config
from ra3_trl.cli import show as show_command
from ra3_trl.cli.main import guarded
from ra3_trl.models import AbstractionConfig, AbstractionHead, save_head
from ra3_trl.policy import HeadDecisions
from ra3_trl.records import Action, Boundary, Document, Latent, RolloutGroup
from ra3_trl.report import page
from ra3_trl.report.look import look, over_elsewhere
from ra3_trl.report.page import render_page, write_page
from ra3_trl.report.show import ShownBoundary, ShownFile, ShownLatent, physical_lines, print_file
from ra3_trl.segmentation import PROSE, PYTHON, Segmenter


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SOURCE = '''\
"""Doc

string."""
import os  # why

# the expert's own comment
x = [
\t1,
]
def f(a):
    if a:
        return "dreißig ∑"

    return \\
        a
'''
# By hand: 1 has nothing before it that could predict a latent, 6 is a comment and 7 follows one, 2, 3, 8, 9 and 15
# stand inside of a string, a bracket and behind a backslash, 5 and 13 are blank.
BOUNDARIES = [4, 10, 11, 12, 14]
TEXTS = {
    "plain": SOURCE,
    "crlf": SOURCE.replace("\n", "\r\n"),
    "no newline at the end": SOURCE[:-1],
    "byte-order mark": "\ufeff" + SOURCE,
    "blank lines around": "\n \n" + SOURCE + "\n\n",
}
SETTINGS = {"num_latents": 4, "horizon": 2, "discount": 0.5}


class FakeEngine:
    """P(think) is 1 / (1 + ordinal of the action); of four latents the last two are the same. They make the next line
    likelier by 2, 4, 6 and 6 nats, the one behind it by half of that."""

    backbone = SimpleNamespace(model=torch.nn.Module(), gathered=nullcontext)

    def __init__(self, words: list[tuple[int, ...]]):
        self.words = words

    def rollout(self, document, boundaries, num_latents, horizon, noise):
        t = len(boundaries)
        drawn = [Latent(ids, True, (-1.0 * len(ids), -0.5)) for ids in (*self.words, self.words[-1])]
        likelier = torch.tensor([2.0, 4.0, 6.0, 6.0])[None, :, None] * torch.tensor([1.0, 0.5])[None, None, :horizon]
        think = torch.tensor([1 / (1 + a.index) if a.boundary else 0.0 for a in document.actions])
        return RolloutGroup(  # without a latent a line lacks just the mass of thinking before it: its return is 0
            document, tuple(boundaries), (tuple(drawn),) * t, (1 - think).log(), think.log(),
            likelier.expand(t, -1, -1), torch.full((t, 4, horizon), -torch.inf),
            torch.zeros(len(document.boundaries), 2),
        )  # fmt: skip

    def score(self, document, boundaries, latents, horizon):
        """Latents from elsewhere make the next line likelier by 1 nat, and the one behind it not."""
        group = self.rollout(document, boundaries, 4, horizon, None)
        likelier = torch.tensor([1.0, 0.0])[:horizon].expand(len(boundaries), 4, -1)
        return replace(group, latents=tuple(latents), latent_line_logps_TGH=likelier)


class FakeHead(HeadDecisions):
    """P(think) is one half everywhere, the predicted gain 1.25 nats."""

    def predict(self, states_SD):
        one_half, ones = torch.full((len(states_SD),), 0.5), torch.ones(len(states_SD))
        return one_half.log(), 1.25 * ones, ones


def seen_by(
    tokenizer, text, action_format=PYTHON, max_tokens=1000, name="x.py", lines=None, head=False, **settings
) -> ShownFile:
    words = [tuple(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in (" one", " two", " three")]
    args = RA3Config(output_dir="unused", report_to="none", horizon=2, discount=0.5, **settings)
    segmenter = Segmenter(tokenizer, action_format, max_tokens)
    assert segmenter(0, text)[0].status == "actions"
    policy = Policy(FakeEngine(words), args, segmenter, FakeHead(None, args) if head else None)
    return replace(look(policy, text, name, "checkpoint", lines), settings=SETTINGS)


def lines_of(shown: ShownFile) -> list[str]:
    """The lines as their rows give them; every number once and in order."""
    lines: list[str] = []
    for row in shown.rows():
        text = "".join(text for _, text in row.runs)
        if row.number is None:
            lines[-1] += text
        else:
            assert row.number == len(lines) + shown.first
            lines.append(text)
    return lines


@pytest.mark.parametrize("max_tokens", [1000, 32])
@pytest.mark.parametrize("name", TEXTS)
def test_boundaries_stand_where_they_are_and_every_line_is_shown_once(tokenizer, name, max_tokens):
    text = TEXTS[name]
    shown = seen_by(tokenizer, text, max_tokens=max_tokens)
    first = [3] if name == "blank lines around" else []  # the newlines before it predict a latent
    below = 2 if name == "blank lines around" else 0
    found = [b.line for b in shown.boundaries]
    assert [line for line in found if line not in first] == [line + below for line in BOUNDARIES]
    assert all(b.column == 0 for b in shown.boundaries)
    assert lines_of(shown) == text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    indents = {b.line - below: b.indent for b in shown.boundaries}
    # What stands before leads one to expect: nothing, one unit behind `:`, two, and the line before's two.
    assert [indents[line] for line in (10, 11, 12, 14)] == ["", "    ", "        ", "        "]


def test_latents_are_counted_ordered_and_credited(tokenizers):
    shown = seen_by(tokenizers["newline_alone"], SOURCE)
    by_line = {b.line: b for b in shown.boundaries}
    three, *others = by_line[10].latents
    assert (three.text, three.count, three.stopped) == ("# three", 2, True)  # the most often drawn first
    assert {z.text for z in others} == {"# one", "# two"} and others[0].logp >= others[1].logp
    # Two lines, the second discounted by 0.5: 6 + 0.5 * 3 = 7.5. The last line has no second: 6.
    assert three.gain == pytest.approx(7.5)
    assert by_line[14].latents[0].gain == pytest.approx(6.0)
    # Lines 1, 4, 6, 7, 10, 11, 12, 14 are actions 0 to 7: P(think) at line 10 is 1 / (1 + 4).
    assert by_line[10].think_prob == pytest.approx(0.2)
    found = shown.summary()
    assert found["boundaries"] == 5 and found["helps"] == 1
    assert found["expected_latents"] == pytest.approx(1 / 2 + 1 / 5 + 1 / 6 + 1 / 7 + 1 / 8)
    # The draws' mean is 4.5 for the next line and 2.25 behind it: 4.5 + 0.5 * 2.25 = 5.625 at three boundaries; behind
    # line 4 stands a comment and behind line 14 nothing, so it is 4.5 there.
    assert found["gain"] == pytest.approx((3 * 5.625 + 2 * 4.5) / 5)


def test_sameness_is_of_all_that_was_drawn(tokenizers):
    """Three texts among 5 * 4 draws, of which two of each four say the same; and what latents bring more than those
    from elsewhere, 1 nat at all boundaries: the mean gain of the test above less 1."""
    shown = seen_by(tokenizers["newline_alone"], SOURCE)
    assert shown.sameness() == (3 / 20, "# three", 0.5)
    assert shown.over_elsewhere == pytest.approx((3 * 5.625 + 2 * 4.5) / 5 - 1)
    out, page = printed(shown, width=200), render_page(shown)
    assert "Of all latents drawn 15% are different; 50% are '# three'.\n" in out
    assert "A latent brings +4.17 nats more than one drawn at another boundary of this file" in out
    assert "most frequent, 50 %: <code># three</code>" in page and "<dd>+4.17 <small>nats</small></dd>" in page
    one = seen_by(tokenizers["newline_alone"], SOURCE, lines=range(10, 11))
    assert one.over_elsewhere is None and "another boundary of this file" not in printed(one)


def test_elsewhere_is_half_the_boundaries_away():
    """Latents 1, 2, 3, 4 at four boundaries, each worth its number times that of the boundary's line, 1, 2, 3, 4; in
    their place 3, 4, 1, 2: 1 - 3, 4 - 8, 9 - 3, 16 - 8."""
    document = Document(
        0, 0, tuple(range(5)), tuple(Action(i, i + 1, i + 2, Boundary((1,), (2,))) for i in range(4)), 1
    )
    none = torch.full((4,), -torch.inf)

    def score(document, boundaries, latents, horizon):
        each = zip(boundaries, latents, strict=True)
        worth = torch.tensor([[[(b + 1.0) * z.token_ids[0]] for z in row] for b, row in each])
        latents = tuple(map(tuple, latents))
        return RolloutGroup(document, tuple(boundaries), latents, torch.zeros(4), none, worth, none[:, None, None])

    engine = SimpleNamespace(score=score)
    group = score(document, range(4), [[Latent((i,), True)] for i in (1, 2, 3, 4)], 1)
    policy = SimpleNamespace(engine=engine, args=SimpleNamespace(discount=1.0))
    assert over_elsewhere(policy, group) == [-2.0, -4.0, 6.0, 8.0]


def test_lines_limit_what_is_drawn(tokenizers):
    shown = seen_by(tokenizers["newline_indent"], SOURCE, lines=range(10, 12))
    assert [b.line for b in shown.boundaries] == [10, 11]
    assert lines_of(shown) == ["def f(a):", "    if a:"]


def test_boundaries_inside_of_a_line_cut_it(tokenizers):
    text = "It rained. He slowed. Why?\n\nNobody knew.\n"
    shown = seen_by(tokenizers["newline_alone"], text, PROSE, name="x.txt")
    rows = [(row.number, "".join(t for _, t in row.runs), row.boundary is not None) for row in shown.rows()]
    assert rows == [
        (1, "It rained. ", False), (None, "He slowed. ", True), (None, "Why?", True), (2, "", False),
        (3, "Nobody knew.", True),
    ]  # fmt: skip
    assert shown.boundaries[0].latents[0].text == "[ three]"
    cells = read_page(render_page(shown)).lines
    assert "".join(cells[:3]) == "It rained. He slowed. Why?"


def test_the_head_stands_beside_the_tokens(tokenizers):
    tokenizer = tokenizers["newline_alone"]
    by_tokens = seen_by(tokenizer, SOURCE, head=True).boundaries[1]
    assert (by_tokens.think_prob, by_tokens.other_prob, by_tokens.predicted_gain) == pytest.approx((0.2, 0.5, 1.25))
    shown = seen_by(tokenizer, SOURCE, head=True, gate="head")
    assert shown.boundaries[1].think_prob == 0.5 and shown.boundaries[1].other_prob == pytest.approx(0.2)
    out = io.StringIO()
    print_file(shown, Console(file=out, width=100))
    assert re.search(r"\n +10 +0\.500 \S +0\.200 +\+1\.25 +│ def f\(a\):\n", out.getvalue())
    assert "by the head" in out.getvalue() and "Predicted" in render_page(shown)


# ---- terminal ----


def printed(shown: ShownFile, **options) -> str:
    out = io.StringIO()
    print_file(shown, Console(file=out, **options))
    return out.getvalue()


def test_piped_output_is_plain_and_whole(tokenizers):
    shown = seen_by(tokenizers["newline_alone"], SOURCE + "long = " + "1 + " * 60 + "1\n")
    out = printed(shown, width=40)
    assert "\x1b" not in out
    rows = [line.split(" │ ", 1) for line in out.split("\n\n", 1)[1].rstrip("\n").split("\n")[1:]]
    lines = [text for number, text in rows if number.strip()[:1].isdigit()]
    assert lines == [line.expandtabs(8) for line in shown.text.rstrip("\n").split("\n")]  # not wrapped, none missing
    assert [text for number, text in rows if number.strip() == "+7.50"] == [
        "# three  (2 of 4)", "    # three  (2 of 4)", "        # three  (2 of 4)", "        # three  (2 of 4)",
    ]  # fmt: skip


def test_a_terminal_wraps_beside_the_numbers(tokenizers):
    shown = seen_by(tokenizers["newline_alone"], "a = 1\nlong = " + "1 + " * 60 + "1\n")
    out = printed(shown, force_terminal=True, width=50)
    assert "\x1b[" in out
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert max(map(len, plain.split("\n"))) <= 50
    assert re.search(r"\n {22} │ 1 \+ 1", plain)
    assert "\x1b[3" not in printed(shown, force_terminal=True, no_color=True, width=50).replace("\x1b[3m", "")


def test_control_characters_can_not_reach_the_terminal(tokenizers):
    text = 'x = 1\nprint("\x1b[2J\u202e")\n'
    shown = seen_by(tokenizers["newline_alone"], text)
    out = printed(shown)
    assert "\x1b" not in out and "\u202e" not in out
    assert '"␛[2J\\u202e"' in out


# ---- page ----


class Page(HTMLParser):
    """Text of the lines and of the latents above them, and every tag."""

    def __init__(self):
        super().__init__()
        self.lines, self.latents, self.tags, self.ids, self.described = [], [], [], [], []
        self._into, self._in_tip, self._latent = None, 0, False

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        classes = attrs.get("class", "").split()
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.described += [attrs["aria-describedby"]] if "aria-describedby" in attrs else []
        if tag == "tr" and not self._in_tip:
            self._latent = "latent" in classes
        elif tag == "div" and "tip" in classes:
            self._in_tip = 1
        elif tag == "td" and "src" in classes:
            self._into = self.latents if self._latent else self.lines
            self._into.append("")
        elif tag == "small":
            self._into = None

    def handle_endtag(self, tag):
        if tag == "div" and self._in_tip:
            self._in_tip = 0
        elif tag == "td" and not self._in_tip:
            self._into = None

    def handle_data(self, data):
        if self._into is not None and not self._in_tip:
            self._into[-1] += data


def read_page(html: str) -> Page:
    read = Page()
    read.feed(html)
    read.close()
    return read


HOSTILE = "# </script><img src=x onerror=alert(1)> \"q\" 'q' &amp; {{ 7 * 7 }}"


def hand_made(text: str = 'def f():\n    return "</td>&lt;"\n\nf()\n') -> ShownFile:
    """Three boundaries: nothing thought of and full harm, P(think) 1 and full help, and a hostile latent."""
    latents = [(ShownLatent("# no", 3, True, -1.5, -4.0), ShownLatent(HOSTILE, 1, False, -9.0, 0.25))]
    latents += [(ShownLatent("# yes", 4, True, -0.5, 3.0),), (ShownLatent(HOSTILE, 4, True, -2.0, 0.0),)]
    places = zip((1, 2, 4), ("", "    ", ""), (0.0, 1.0, 0.25), latents, strict=True)
    boundaries = tuple(ShownBoundary(line, 0, indent, p, z, 0.5, 0.1) for line, indent, p, z in places)
    return ShownFile("<b>.py", text, "org/<i>model", boundaries, 1, len(physical_lines(text)), SETTINGS)


def test_the_page_shows_the_text_and_escapes_everything():
    shown = hand_made()
    read = read_page(render_page(shown))
    assert read.lines == shown.text.removesuffix("\n").split("\n")
    assert read.latents == ["# no", "    # yes", HOSTILE]
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "img", "link", "b", "iframe"})
    assert not [attrs for _, attrs in read.tags if {"src", "onerror"} & set(attrs)]
    assert all(attrs["href"].startswith("#") for _, attrs in read.tags if "href" in attrs)
    assert len(read.ids) == len(set(read.ids)) and set(read.described) < set(read.ids)


@pytest.mark.parametrize("name", TEXTS)
def test_the_page_has_every_line(tokenizers, name):
    read = read_page(render_page(seen_by(tokenizers["newline_indent"], TEXTS[name])))
    assert read.lines == TEXTS[name].replace("\r\n", "\n").replace("\ufeff", "\\ufeff").removesuffix("\n").split("\n")


def test_the_page_grows_with_the_file_and_no_faster(tokenizers):
    sizes = [len(render_page(seen_by(tokenizers["newline_alone"], "x = 1\n" * n))) for n in (100, 200, 300)]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.02)


def luminance(color: tuple[float, ...]) -> float:
    """Relative luminance of WCAG 2."""
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def mixed(hue, ground, share: float) -> tuple[float, ...]:
    return tuple(share * h + (1 - share) * g for h, g in zip(hue, ground, strict=True))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_all_text_can_be_read_on_every_shade(theme):
    style = Path(page.__file__).with_name("palette.css").read_text("utf-8")
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", style)
    color = {n: tuple(int(p[theme][i : i + 2], 16) for i in (1, 3, 5)) for n, *p in pairs}
    most = float(re.search(r"--most: (\d+)%", style)[1]) / 100
    think, helps, harms = (mixed(color[n], color["page"], most) for n in ("think", "helps", "harms"))
    words = ("text", "muted", "comment", "keyword", "string", "number", "name", "builtin")
    on = dict.fromkeys(words, (color["page"], think))
    on |= {"helps-text": (color["page"], helps), "harms-text": (color["page"], harms)}
    on["muted"] += (color["panel"], helps, harms)
    for name, grounds in on.items():
        for ground in grounds:
            bright, dim = sorted((luminance(color[name]), luminance(ground)), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (name, ground)  # AA


def test_an_interrupted_page_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "out.html"
    path.write_text("before")
    render, shown = page.render_page, hand_made()

    def stopped(shown):
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "render_page", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_page(shown, path)
    monkeypatch.setattr(page, "render_page", lambda shown: render(shown) + "\ud800")  # can't be written
    with pytest.raises(UnicodeEncodeError):
        write_page(shown, path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_page(shown, path)
    assert path.read_text("utf-8").startswith("<!doctype html>") and list(tmp_path.iterdir()) == [path]


# ---- command ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizers, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama", tokenizers["newline_indent"], max_position_embeddings=512).save_pretrained(folder)
    tokenizers["newline_indent"].save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "source.py"
    path.write_bytes(SOURCE.encode())
    return path


def run(*argv) -> int:
    return guarded(show_command.main, [*map(str, argv), "--max_length", "128", "--max_latent_length", "4"])


def test_the_command_prints_a_file(checkpoint, source, capsys, slow_path, tokenizers):
    assert run(checkpoint, source, "--num_latents", "2") == 0
    out = capsys.readouterr().out
    assert f"source.py as seen by {checkpoint.name}\nBoundaries: 5," in out and str(checkpoint) not in out
    for number, line in enumerate(SOURCE.split("\n")[:-1], 1):
        assert len(re.findall(rf"(?m)^ *{number} .*│ {re.escape(line.expandtabs(8))}$", out)) == 1
    assert run(checkpoint, source, "--num_latents", "2") == 0
    assert capsys.readouterr().out == out  # the same draws
    assert run(checkpoint, source, "--num_latents", "2", "--seed", "7") == 0
    assert capsys.readouterr().out != out
    assert source.read_bytes() == SOURCE.encode()


def test_a_file_without_boundaries_is_shown(checkpoint, tmp_path, capsys):
    path = tmp_path / "source.py"
    path.write_text("# a comment\n\n# another\n")
    assert run(checkpoint, path) == 0
    out = capsys.readouterr().out
    assert "Boundaries: 0, mean P(think) 0.000" in out and "│ # another\n" in out
    assert run(checkpoint, path, "--html", tmp_path / "out.html") == 0
    assert read_page((tmp_path / "out.html").read_text("utf-8")).lines == ["# a comment", "", "# another"]


def test_an_encoding_that_lacks_characters_is_no_error(checkpoint, source, monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, "ascii", write_through=True))
    assert run(checkpoint, source, "--num_latents", "1", "--lines", "11:12") == 0
    assert rb"| " in out.getvalue() and rb'"drei\xdfig \u2211"' in out.getvalue()


def test_p_think_is_the_models(checkpoint, source, slow_path, tokenizers, tiny_model):
    tokenizer = tokenizers["newline_indent"]
    options = show_command._parser().parse_args([str(checkpoint), str(source), "--max_length", "400"])
    shown = show_command.show(options, SOURCE, range(1, 16))
    (document,) = Segmenter(tokenizer, PYTHON, 400)(0, SOURCE)
    slow = slow_path(tiny_model("llama", tokenizer, max_position_embeddings=512), tokenizer)
    expected = [float(slow.gate(document, boundary).detach().exp()) for boundary in document.boundaries]
    assert [b.think_prob for b in shown.boundaries] == pytest.approx(expected, abs=1e-4)


def test_settings_and_the_gate_are_the_checkpoints(checkpoint, source, tmp_path, capsys):
    folder = tmp_path / "with_head"
    shutil.copytree(checkpoint, folder)
    args = RA3Config(output_dir="unused", report_to="none", gate="head", horizon=3, max_latent_length=4)
    args.save_pretrained(folder)
    save_head(AbstractionHead(AbstractionConfig(32, think_prob=0.3)), folder)
    assert run(folder, source, "--num_latents", "1") == 0
    out = capsys.readouterr().out
    assert "(horizon 3)" in out and "by the tokens" in out  # the head has learned nothing yet
    save_head(AbstractionHead(AbstractionConfig(32, think_prob=0.3, trained_on=9)), folder)
    assert run(folder, source, "--num_latents", "1", "--horizon", "1") == 0
    out = capsys.readouterr().out
    assert "(horizon 1)" in out and "by the head" in out and "mean P(think) 0.300" in out
    assert len(re.findall(r"0\.300 ▄ +\d\.\d{3} +[+-]0\.00", out)) == len(BOUNDARIES)


def test_an_adapter_and_a_page(checkpoint, source, tmp_path, tokenizers, tiny_model, capsys):
    base = tiny_model("llama", tokenizers["newline_indent"], max_position_embeddings=512)
    base.config._name_or_path = str(checkpoint)
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter.peft_config["default"].base_model_name_or_path = str(checkpoint)
    adapter.save_pretrained(tmp_path / "adapter")
    tokenizers["newline_indent"].save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out.html"
    assert run(tmp_path / "adapter", source, "--html", out, "--lines", "10:12") == 0
    assert "Wrote" in capsys.readouterr().out
    read = read_page(out.read_text("utf-8"))
    assert read.lines == SOURCE.split("\n")[9:12] and len(read.latents) == 3


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"", [], "`file` .* is empty"),
        (b" \n\n", [], "`file` .* is empty"),
        (b"x = 1\n\0", [], "`file` .* is binary"),
        ("x = 'ß'\n".encode("latin-1"), [], "`file` .* not in UTF-8 .byte 5 is 0xdf"),
        (b"def f(:\n  'x\n", [], "`file` .* can't be read as 'python'"),
        (b"x = 1\ry = 2\n", [], "`file` .* can't be read as 'python'"),
        (b"x = 1\n", ["--lines", "2:3"], "`lines` is '2:3', but the file has the lines 1:1"),
        (b"x = 1\n", ["--lines", "0:1"], "`lines` is '0:1'"),
        (b"x = 1\n", ["--lines", "first"], "`lines` is 'first'; write it as A:B"),
        (b"x = 1\n", ["--html", "FOLDER"], "`html` is .* a folder"),
        (b"x = 1\n", ["--html", "FOLDER/none/out.html"], "`html` is .* folder is not there"),
        (b"x = 1\n", ["--html", "FOLDER/source.py"], "`html` is .* the very file"),
        (b"x = 1\n", ["--num_latents", "0"], "`num_latents` is 0"),
        (b"x = 1\n", ["--action_format", "cobol"], "`action_format` is 'cobol'"),
        (b"x = 1\n", ["--action_format", "tags"], "lacks the special tokens"),
        (b"x = 1\n", ["--max_length", "100000"], "`max_length` is 100000"),
    ],
)
def test_what_the_user_can_mend_ends_with_2(checkpoint, tmp_path, capsys, content, options, words):
    (tmp_path / "source.py").write_bytes(content)
    options = [option.replace("FOLDER", str(tmp_path)) for option in options]
    assert guarded(show_command.main, [str(checkpoint), str(tmp_path / "source.py"), *options]) == 2
    captured = capsys.readouterr()
    assert re.search(f"error: .*{words}", captured.err) and "Traceback" not in captured.err
    assert (tmp_path / "source.py").read_bytes() == content and len(list(tmp_path.iterdir())) == 1


def test_a_missing_checkpoint_or_file_ends_with_2(checkpoint, source, tmp_path, capsys):
    assert run(checkpoint, tmp_path / "none.py") == 2
    assert "none.py" in capsys.readouterr().err
    assert run(checkpoint, tmp_path) == 2
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", source) == 2
    assert "empty', a folder without config.json" in capsys.readouterr().err
    assert run("/none/such/folder", source) == 2
    assert "`checkpoint` is '/none/such/folder', where there is no folder" in capsys.readouterr().err


# ---- the page in a browser ----


class Browser:
    """A headless Chromium, spoken to over a pipe by its DevTools protocol."""

    def __init__(self, url: str, profile: Path):
        (from_us, self._write), (self._read, to_us) = os.pipe(), os.pipe()

        def ends() -> None:  # Chromium reads from descriptor 3 and writes to 4
            os.dup2(from_us, 103), os.dup2(to_us, 104)
            os.dup2(103, 3), os.dup2(104, 4)

        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
            "--no-first-run", f"--user-data-dir={profile}", "--window-size=1000,900",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, preexec_fn=ends, close_fds=False, stderr=subprocess.DEVNULL)
        os.close(from_us), os.close(to_us)
        self._in, self._out = os.fdopen(self._read, "rb"), os.fdopen(self._write, "wb")
        self._count, self._session, self.requests = 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)
        while self.js("document.readyState") != "complete":
            time.sleep(0.02)

    def call(self, method: str, **params) -> dict:
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._count, "method": method, "params": params, **session}
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while (answer := self._receive()).get("id") != self._count:
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict:
        content = b""
        while (byte := self._in.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            content += byte
        return json.loads(content)

    def js(self, expression: str):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def point_at(self, selector: str) -> None:
        x, y = self.js(f"(r => [r.x + 30, r.y + 4])(document.querySelector('{selector}').getBoundingClientRect())")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def scheme(self, value: str, media: str = "") -> None:
        features = [{"name": "prefers-color-scheme", "value": value}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def visible(self, selector: str) -> bool:
        style = f"getComputedStyle(document.querySelector('{selector}'))"
        return self.js(f"{style}.visibility == 'visible' && {style}.display != 'none'")

    def screenshot(self, path: Path):
        from PIL import Image

        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return Image.open(path).convert("RGB")

    def close(self) -> None:
        self._session = None
        try:
            self.call("Browser.close")
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()
            self._in.close(), self._out.close()


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("no chromium: `apt-get install chromium`")
    write_page(hand_made(), tmp_path / "page.html")
    browser = Browser((tmp_path / "page.html").as_uri(), tmp_path / "profile")
    yield browser
    browser.close()


def near(pixel: tuple[int, ...], color: tuple[float, ...]) -> bool:
    return all(abs(p - c) <= 2 for p, c in zip(pixel, color, strict=True))


def left_of(browser: Browser, selector: str) -> tuple[int, int]:
    return tuple(
        browser.js(f"(r => [r.x + 3, r.y + 8])(document.querySelector('{selector}').getBoundingClientRect())")
    )


@pytest.mark.timeout(60)
def test_the_page_in_light_and_dark(browser, tmp_path):
    # 30 % of the hue over the page's own colour: harms (239, 125, 45), helps (26, 163, 122), think (124, 92, 255).
    white, black = (255, 255, 255), (0x14, 0x16, 0x1C)
    rows = {"harms": "#L1 .latent", "never": "#L1 .row", "helps": "#L2 .latent", "always": "#L2 .row"}
    at = {name: left_of(browser, row) for name, row in (rows | {"quarter": "#L4 .row"}).items()}
    browser.scheme("light")
    light = browser.screenshot(tmp_path / "light.png")
    assert near(light.getpixel((2, 2)), white) and near(light.getpixel(at["never"]), white)
    assert near(light.getpixel(at["harms"]), mixed((239, 125, 45), white, 0.3))
    assert near(light.getpixel(at["helps"]), mixed((26, 163, 122), white, 0.3))
    assert near(light.getpixel(at["always"]), mixed((124, 92, 255), white, 0.3))
    assert near(light.getpixel(at["quarter"]), mixed((124, 92, 255), white, 0.15))  # the square root of 1/4
    browser.scheme("dark")
    dark = browser.screenshot(tmp_path / "dark.png")
    assert near(dark.getpixel((2, 2)), black) and near(dark.getpixel(at["helps"]), mixed((18, 128, 95), black, 0.3))
    browser.js("document.getElementById('light').click()")  # against what the system says
    assert browser.screenshot(tmp_path / "chosen.png").getpixel((2, 2)) == white
    assert [url for url in browser.requests if not url.startswith("file:")] == [] and len(browser.requests) == 1


@pytest.mark.timeout(60)
def test_alternatives_appear_on_hover_and_on_focus(browser, tmp_path):
    tips = ["#T1", "#T2", "#T4"]
    assert [browser.visible(tip) for tip in tips] == [False] * 3
    browser.point_at("#L1 .latent .src")
    assert [browser.visible(tip) for tip in tips] == [True, False, False]
    browser.point_at("#T1 td")  # one may move onto it
    assert browser.visible("#T1")
    assert browser.js("document.querySelector('#T1').innerText.includes('onerror=alert(1)')")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert [browser.visible(tip) for tip in tips] == [False] * 3
    seen = []
    for _ in range(6):  # the check box, the colours, the settings, three boundaries
        browser.press("Tab", 9)
        seen.append([browser.visible(tip) for tip in tips])
    assert seen[:3] == [[False] * 3] * 3
    assert seen[3:] == [[True, False, False], [False, True, False], [False, False, True]]
    browser.js("document.getElementById('latents').click()")
    assert not browser.visible(".latent") and browser.visible("#L1 .row")
    browser.scheme("dark", media="print")
    assert not browser.visible("#T4") and not browser.visible("fieldset")


@pytest.mark.timeout(60)
def test_the_page_fits_a_phone(browser):
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=True)
    browser.js("document.getElementById('P1').focus()")
    assert browser.visible("#T1") and browser.js("document.documentElement.scrollWidth") <= 360
    left, right = browser.js("(r => [r.left, r.right])(document.querySelector('#T1').getBoundingClientRect())")
    assert 0 <= left < right <= 360
    assert browser.js("document.querySelector('#L1 .row .src').getBoundingClientRect().width") > 180
