"""`ra3 play`: what the page shows is what `ra3 show` says, the Space's files, and the page in a headless Chromium."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from hub_server import Hub, client_environment
from test_show import CHROMIUM, HOSTILE, SOURCE, Browser, hand_made, read_page, seen_by

from ra3_trl import Policy
from ra3_trl.cli import early
from ra3_trl.cli import play as play_command
from ra3_trl.cli.main import guarded, main
from ra3_trl.hub import SpacePush
from ra3_trl.models import AbstractionConfig, AbstractionHead, save_head
from ra3_trl.report import play
from ra3_trl.report.look import look
from ra3_trl.report.show import physical_lines


ROOT = Path(__file__).parents[1]
SETTINGS = {"max_length": 256, "max_latent_length": 4, "horizon": 2, "existing_comments": "keep", "use_cpu": True}
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is missing: pip install '.[play]'")


@pytest.fixture(scope="module")
def policy(tokenizers, tiny_model) -> Policy:
    tokenizer = tokenizers["newline_indent"]
    return Policy.open(tiny_model("llama", tokenizer, max_position_embeddings=512), tokenizer=tokenizer, **SETTINGS)


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory) -> Path:
    """The same as a checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


# ---- what is shown, by the functions that `ra3 show` has ----


def test_p_think_and_latents_are_those_of_show(policy):
    """`see` runs one forward and `look` draws besides; a line drawn alone has the draws of the whole file."""
    whole = look(policy.changed(args=policy.args), SOURCE)
    seen = play.see(policy, SOURCE)
    assert [b.line for b in seen.boundaries] == [4, 10, 11, 12, 14]
    assert [b.think_prob for b in seen.boundaries] == pytest.approx([b.think_prob for b in whole.boundaries], abs=1e-6)
    assert not any(b.latents for b in seen.boundaries)
    (drawn,) = play.draw(policy, SOURCE, 11, policy.args.num_latents, policy.args.seed).boundaries
    (same,) = (b for b in whole.boundaries if b.line == 11)
    assert [(z.text, z.count) for z in drawn.latents] == [(z.text, z.count) for z in same.latents]
    for z, other in zip(drawn.latents, same.latents, strict=True):
        assert (z.gain, z.logp) == pytest.approx((other.gain, other.logp), abs=1e-4)
    others = play.draw(policy, SOURCE, 11, policy.args.num_latents, policy.args.seed + 1).boundaries[0]
    assert {z.text for z in others.latents} != {z.text for z in drawn.latents}


def test_a_gain_is_split_by_the_lines_it_is_of(tokenizers):
    """Of `seen_by`'s latents the last makes the next line likelier by 6 nats and the one behind it by 3, which counts
    half. Behind line 4 stands a comment and behind line 14 nothing."""
    by_line = {b.line: b for b in seen_by(tokenizers["newline_alone"], SOURCE).boundaries}
    assert {line: b.ahead for line, b in by_line.items()} == {
        4: (4,),
        10: (10, 11),
        11: (11, 12),
        12: (12, 14),
        14: (14,),
    }
    assert by_line[10].latents[0].by_line == pytest.approx((6.0, 1.5))
    assert by_line[4].latents[0].by_line == by_line[14].latents[0].by_line == pytest.approx((6.0,))
    for boundary in by_line.values():
        assert all(sum(z.by_line) == pytest.approx(z.gain) for z in boundary.latents)


def test_what_is_not_finished_is_seen_as_far_as_it_can_be_read(policy):
    """The open bracket of the third row leaves two rows; finished, all are read."""
    text = "x = 1\ny = x\nz = (x,\n  "
    seen = play.see(policy, text)
    assert seen.text == "x = 1\ny = x\n" and [b.line for b in seen.boundaries] == [2]
    page = play.render_gates(seen, text, 0.5)
    assert "From line 3 on this can't be read as python yet" in page and "z = (x," in re.sub("<.*?>", "", page)
    assert [b.line for b in play.see(policy, text + "y)\n").boundaries] == [2, 3]
    assert "can't be read" not in play.render_gates(play.see(policy, text + "y)\n"), text + "y)\n", 0.5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: play.see(p, " \n"), "`text` is empty; type or paste some code"),
        (lambda p: play.see(p, "x = 1\n" * 4000), "`text` has 24,000 characters; 20,000 are looked at here at most"),
        (lambda p: play.see(p, "def f(:\n"), "`text` can't be read as 'python'.*mend it, or open the checkpoint with"),
        (lambda p: play.draw(p, SOURCE, 2), "`line` is 2, before which no latent may stand; choose one of 4, 10, 11"),
        (lambda p: play.draw(p, SOURCE, 99), "`line` is 99, before which no latent may stand"),
        (lambda p: play.draw(p, "x = 1", 1), "`line` is 1, before which no latent may stand; type a second line"),
        (lambda p: play.draw(p, SOURCE, 4, 0), "`num_latents` is 0; use a number from 1 to 64"),
        (lambda p: play.draw(p, SOURCE, 4, 8, -1), "`seed` is -1; use a number from 0 to"),
        (lambda p: play.complete(p, ""), "`text` is empty"),
        (lambda p: play.see(p, "x = 1\ny = '\ud83d'\n"), "`text` has half of a character in line 2"),
        (lambda p: play.complete(p, "x = '\ud83d'\n"), "`text` has half of a character in line 1"),
        (lambda p: play.complete(p, "x", max_new_tokens=1025), "`max_new_tokens` is 1025; use a number from 1 to"),
        (lambda p: play.complete(p, "x = 1\n", max_new_tokens=511), "`max_new_tokens` is 511 behind .* holds 512"),
        (lambda p: play.complete(p, "x", temperature=math.nan), "`temperature` is nan; use a number from 0 to 10"),
        (lambda p: play.complete(p, "x", threshold=2.0), "`threshold` is 2.0"),
        (lambda p: play.complete(p, "x", think="perhaps"), "`think` is 'perhaps'"),
    ],
)  # fmt: skip
def test_what_can_not_be_meant_is_said_in_a_line(policy, call, says):
    with pytest.raises(ValueError, match=says) as caught:
        call(policy)
    assert "\n" not in str(caught.value)


def test_completions_with_and_without(policy):
    """Those of `Policy.generate`, greedy; drawn, the seed decides and leaves the process's random numbers alone."""
    prompt, settings = "x = 1\n", {"max_new_tokens": 24}
    never = play.complete(policy, prompt, "never", **settings)
    assert never == policy.generate(prompt, "never", do_sample=False, **settings)
    everywhere = play.complete(policy, prompt, "auto", 0.0, **settings)
    assert everywhere == policy.generate(prompt, "auto", 0.0, do_sample=False, **settings) != never
    assert everywhere.lstrip().startswith("#") and play.complete(policy, prompt, "auto", 1.0, **settings) == never
    import torch

    before = torch.random.get_rng_state()
    drawn = [play.complete(policy, prompt, "never", seed=s, temperature=1.0, **settings) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and torch.equal(torch.random.get_rng_state(), before)


def test_a_context_may_be_filled(policy, monkeypatch):
    used = len(policy.tokenizer("x = 1\n").input_ids)
    monkeypatch.setattr(play, "context_length", lambda model: used + 4)
    play.complete(policy, "x = 1\n", max_new_tokens=4)
    with pytest.raises(ValueError, match=f"`max_new_tokens` is 5 behind {used} tokens of `text`.* holds {used + 4}"):
        play.complete(policy, "x = 1\n", max_new_tokens=5)


@pytest.mark.parametrize("gate", ["token", "head"])
def test_completions_think_where_the_page_says(folder, tmp_path, gate):
    """A head that is sure of thinking counts where it is the gate; a tiny model's tokens are not."""
    shutil.copytree(folder, tmp_path / "with_head")
    head = AbstractionHead(AbstractionConfig(32, max_latent_length=4, trained_on=1))
    head.outer.weight.data.zero_(), head.outer.bias.data.fill_(9.0)
    save_head(head, tmp_path / "with_head")
    policy, prompt = Policy.open(tmp_path / "with_head", gate=gate, **SETTINGS), "x = 1\n"
    shown = play.see(policy, prompt + "y = 2\n").boundaries[0]
    written = play.complete(policy, prompt, "auto", 0.9, max_new_tokens=8)
    assert (shown.think_prob >= 0.9) == written.lstrip().startswith("#") == (gate == "head")


def test_the_pages_snippet_runs(folder, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "play.md").read_text("utf-8"), re.S)
    place = f"open({str(folder)!r}, use_cpu=True, max_length=256, max_latent_length=4, "
    exec(compile(block.replace('open("MODEL", ', place), "docs/play.md", "exec"), {})
    assert re.search(r"^# ?.* [+-]\d\.\d\d \{3: ", capsys.readouterr().out, re.M)


# ---- as HTML ----


def test_what_is_rendered_is_escaped_and_marked(policy):
    shown = hand_made()  # P(think) 0, 1 and 0.25 before lines 1, 2 and 4
    page = play.render_gates(shown, shown.text, 0.25, line=2)
    read = read_page(page)
    assert read.lines == physical_lines(shown.text) and "at least 0.25 at <b>2</b>" in page
    rows = [attrs["class"].split() for tag, attrs in read.tags if tag == "tr" and attrs.get("class")]
    assert [("thinks" in row, "chosen" in row) for row in rows] == [(False, False), (True, True), (True, False)]
    assert "at least 0.26 at <b>1</b>" in play.render_gates(shown, shown.text, 0.26)
    hostile = f"x = 1\n{HOSTILE}\ny = 2\n"
    for html in (page, play.render_latents(shown), play.render_completion(policy, "x = 1\n", hostile, HOSTILE)):
        assert {tag for tag, _ in read_page(html).tags}.isdisjoint({"script", "img", "b.py", "i"} - {"i"})
        assert "onerror=alert(1)&gt;" in html or html is page


def test_latents_have_a_column_for_each_line(policy):
    shown = play.draw(policy, SOURCE, 11, 3)
    page = play.render_latents(shown)
    assert re.findall(r">Line (\d+)</th>", page) == ["11", "12"]
    for z in shown.boundaries[0].latents:
        for gain in (z.gain, *z.by_line):
            assert f"{gain:+.2f}".replace("-", "\u2212") in page


def test_a_completion_stands_behind_its_prompt(policy):
    """The rest of the prompt's last row is not shown; own-line comments are marked, those behind code are not."""
    page = play.render_completion(policy, "x = 1\ny = ", "2 # two\n# why\nz = 3\n", "title")
    spans = re.findall(r'<span class="(line|thought)">(.*?)</span>\n', page)
    assert [(kind, re.sub("<.*?>", "", text)) for kind, text in spans] == [
        ("line", "2 # two"), ("thought", "# why"), ("line", "z = 3"),
    ]  # fmt: skip
    assert "Nothing: the text ends here." in play.render_completion(policy, "x = 1\n", "", "title")


# ---- command ----


def test_without_gradio_the_cure_is_said(monkeypatch, capsys):
    monkeypatch.setattr(early, "find_spec", lambda name: None)
    assert main(["play", "m"]) == 2
    assert "needs gradio, which is not installed; `pip install 'ra3-trl[play]'`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("/none/such", "`checkpoint` is '/none/such', where there is no folder"),
        ("FOLDER", "a folder without config.json"),
        ("BASE --push_to_space a/b/c", "`push_to_space` is 'a/b/c', no name of a Space; write ORG/NAME"),
        ("BASE --push_to_space a/b --requirement=", "`requirement` is ''; write one requirement"),
        ("BASE --action_format cobol --push_to_space a/b", "`action_format` is 'cobol'"),
    ],
)
def test_what_the_user_can_mend_ends_with_2(folder, tmp_path, words, says, monkeypatch, capsys):
    monkeypatch.setattr(early, "find_spec", lambda name: "there")
    words = words.replace("FOLDER", str(tmp_path)).replace("BASE", str(folder)).split()
    assert guarded(play_command.main, words) == 2
    captured = capsys.readouterr()
    assert f"error: {says}" in captured.err or says in captured.err
    assert len(captured.err.strip().splitlines()) == 1


# ---- the Space ----


def test_the_files_of_a_space():
    """What the Hub reads of them, and that the app opens the page with the options that were given."""
    given = "org/one --push_to_space org/play --horizon 3 --dtype bfloat16 --trust_remote_code --use_cpu"
    options = play_command._parser().parse_args(shlex.split(given))
    words = play_command._words(options)
    assert words == ["--dtype", "bfloat16", "--trust_remote_code", "--horizon", "3"]
    files = SpacePush("org/play").files("org/one", words)
    assert set(files) == {"app.py", "requirements.txt", "README.md"}
    card = yaml.safe_load(files["README.md"].split("---\n")[1])
    pinned = re.search(r"^gradio==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert card["sdk"] == "gradio" and card["sdk_version"] == pinned and card["models"] == ["org/one"]
    assert card["app_file"] == "app.py" and len(card["short_description"]) <= 60  # the Hub's bound
    assert files["requirements.txt"] == f"ra3-trl[play]=={version('ra3-trl')}\n"
    called = []
    scope = {"main": called.append}
    exec(re.sub(r"from .* import main|raise SystemExit", "", files["app.py"]), scope)
    assert called == [["play", "org/one", *words]]
    assert play_command._parser().parse_args(called[0][1:]).horizon == 3


def test_an_adapter_of_a_folder_is_no_space(tmp_path, folder):
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{folder}"}}')
    with pytest.raises(ValueError, match="which a Space does not have; merge it"):
        SpacePush("org/play").upload(str(tmp_path))


# ---- the page in a browser ----


@pytest.fixture(scope="module")
def server(policy):
    """The page's address."""
    from ra3_trl.cli.playground import Playground

    page = Playground(policy, "tiny").launch(wait=False)
    yield page.local_url
    page.close()


@pytest.fixture
def browser(server, tmp_path):
    if CHROMIUM is None:
        pytest.skip("no chromium: `apt-get install chromium`")
    browser = Page(server, tmp_path / "profile")
    browser.until("document.querySelectorAll('#gates tr.at').length == 5")
    yield browser
    browser.close()


class Page(Browser):
    """A page whose parts answer when they are ready."""

    def until(self, condition: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.js(f"!!({condition})"):  # an element by value is `{}`
            assert time.monotonic() < end, (condition, self.js("document.body.innerText"))
            time.sleep(0.05)

    def key(self, key: str, code: int, text: str = "", modifiers: int = 0) -> None:
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                modifiers=modifiers, **more,
            )  # fmt: skip

    def write(self, text: str) -> None:
        """Puts a text into the box, in the place of what is there."""
        self.js("(e => (e.focus(), e.select()))(document.querySelector('#text textarea'))")
        self.call("Input.insertText", text=text)

    def focus_by_tab(self, selector: str, most: int = 60) -> None:
        for _ in range(most):
            if self.js(f"!!document.activeElement.closest('{selector}')"):
                return
            self.key("Tab", 9)
        raise AssertionError(f"Tab never comes to {selector}")

    def numbers(self) -> list[str]:
        return self.js("[...document.querySelectorAll('#gates .num')].map(e => e.textContent)")


@pytest.mark.slow
@needs_gradio
def test_the_page_shows_p_think_as_it_is_typed(browser, policy, server):
    assert browser.numbers() == [f"{b.think_prob:.3f}" for b in play.see(policy, play.EXAMPLE).boundaries]
    text = "x = 1\ny = x\n"
    browser.write(text)
    browser.until("document.querySelectorAll('#gates tr.at').length == 1")
    assert browser.numbers() == [f"{b.think_prob:.3f}" for b in play.see(policy, text).boundaries]
    hostile = 'x = 1\ns = "{{ 7 * 7 }} ${1 + 1} <img src=x onerror=alert(1)> {{#if x}} `"\n'  # of templates and HTML
    browser.write(hostile)
    browser.until("document.querySelector('#gates')?.innerText.includes('onerror')")
    rows = browser.js("[...document.querySelectorAll('#gates tbody .src')].map(e => e.textContent)")
    assert rows == hostile.splitlines() and browser.js("document.querySelector('#gates img')") is None
    browser.write("def f(:\n")
    browser.until("document.querySelector('#error')?.innerText.includes('mend it')")
    assert len(browser.numbers()) == 1  # what was shown stays
    browser.write(text + "z = y\n")
    browser.until(
        "document.querySelectorAll('#gates tr.at').length == 2 && !document.querySelector('#error')?.innerText"
    )
    assert [url for url in browser.requests if not url.startswith((server, "data:", "blob:"))] == []


@pytest.mark.slow
@needs_gradio
def test_thoughts_are_drawn_and_the_threshold_moves_by_keys_alone(browser, policy):
    """Tab to the box and on: choose the second line, draw, move the slider to 0, generate."""
    browser.focus_by_tab("#threshold input[type=range]")
    browser.key("Home", 36)
    browser.until("document.querySelectorAll('#gates tr.thinks').length == 5")
    browser.focus_by_tab("#line")
    browser.key("ArrowDown", 40), browser.key("Enter", 13, "\r")
    browser.until("document.querySelector('#gates tr.chosen .n').textContent == '3'")
    browser.focus_by_tab("#draw")
    browser.key("Enter", 13, "\r")
    browser.until("document.querySelector('#latents tbody tr')")
    expected = [z.text for z in play.draw(policy, play.EXAMPLE, 3).boundaries[0].latents]
    found = browser.js("[...document.querySelectorAll('#latents tbody th')].map(e => e.textContent)")
    assert [text.removesuffix(" …") for text in found] == expected
    browser.focus_by_tab("#go")
    browser.key("Enter", 13, "\r")
    browser.until("document.querySelector('#never pre') && document.querySelector('#auto pre')")
    assert browser.js("document.querySelectorAll('#never .thought').length") == 0
    browser.until("document.querySelector('#auto h3').textContent.includes('0.00')")


@pytest.mark.slow
@needs_gradio
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_fits(browser, width, tmp_path):
    """No part is wider than the screen, of a phone either; and something is drawn on it."""
    browser.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
    )
    browser.js("document.querySelector('#draw').click()")
    browser.until("document.querySelector('#latents tbody tr')")
    assert browser.js("document.documentElement.scrollWidth") <= width
    picture = browser.screenshot(tmp_path / "page.png")
    assert len(set(picture.getdata())) > 50


@pytest.mark.slow
@needs_gradio
def test_a_taken_port_is_said(policy, server):
    from ra3_trl.cli.playground import Playground

    port = int(server.rstrip("/").rpartition(":")[2])
    with pytest.raises(ValueError, match=f"`port` is {port} and `host` None, where no page can be served; name"):
        Playground(policy, "tiny").launch(port=port, wait=False)


@pytest.mark.slow
@needs_gradio
def test_the_spaces_app_runs(folder, tmp_path):
    """What `--push_to_space` pushes, pulled and started as a Space starts it."""
    with Hub() as hub:
        hub.accounts["hf_" + "A" * 34] = ("ada", "lab")
        environment = client_environment(hub, tmp_path / "home", HF_TOKEN="hf_" + "A" * 34, GRADIO_SERVER_PORT="7871")
        push = [sys.executable, "-m", "ra3_trl.cli.main", "play", str(folder), "--push_to_space", "lab/play"]
        subprocess.run([*push, "--max_length", "256", "--max_latent_length", "4"], env=environment, check=True)
        for name, file in hub.repo("lab/play", "space").files().items():
            (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "space" / name).write_bytes(file.data)
        environment |= {"PYTHONPATH": str(ROOT)}
        app = subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path / "space", env=environment)
        try:
            browser = Page("about:blank", tmp_path / "profile") if CHROMIUM else pytest.skip("no chromium")
            end = time.monotonic() + 120
            while browser.js("document.querySelectorAll('#gates tr.at').length") != 5:
                assert time.monotonic() < end and app.poll() is None
                browser.call("Page.navigate", url="http://127.0.0.1:7871"), time.sleep(2)
            browser.close()
        finally:
            app.terminate()
            app.wait(30)
