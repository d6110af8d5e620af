"""The page of `ra3 play`, by gradio; what it shows comes from `report/play.py`. Loaded only where gradio is there."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio

from ..files import one_line
from ..policy import Policy
from ..report import play
from ..report.show import ShownFile, physical_lines


THRESHOLD = 0.5
# Fonts of the machine: nothing is fetched when the page is opened.
_THEME = gradio.themes.Base(
    primary_hue="violet",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
)


def style() -> str:
    """The page's style sheet: the palette of all our pages, without its switch by the system's setting, since gradio
    has one of its own."""
    folder = Path(play.__file__).parent
    palette = folder.joinpath("palette.css").read_text("utf-8")
    palette = palette.replace(":root", ".ra3", 1).replace("  color-scheme: light dark;\n", "", 1)
    variables = palette[: palette.index("}") + 1]  # its classes are under `.ra3` in play.css
    return variables + folder.joinpath("play.css").read_text("utf-8")


def _said(function: Callable[..., tuple], outputs: int) -> Callable[..., tuple]:
    """What the user can mend is said on the page, in a line, and what it shows stays; the error comes last."""

    @wraps(function)
    def call(*args: Any) -> tuple:
        try:
            return (*function(*args), gradio.update(value="", visible=False))
        except ValueError as error:
            return (*(gradio.skip() for _ in range(outputs)), gradio.update(value=str(error), visible=True))

    return call


class Playground:
    """
    The page of a checkpoint.

    Args:
        policy ([`~ra3_trl.policy.Policy`]):
            The checkpoint.
        name (`str`):
            What to call it.
    """

    def __init__(self, policy: Policy, name: str):
        self.policy = policy
        self.name = name

    # ---- what happens, by the functions of report/play.py ----

    def typed(self, text: str, threshold: float, line: int | None) -> tuple[str, dict, ShownFile]:
        """P(think) at each boundary, and the lines to choose from; the chosen one stays if it is still there."""
        shown = play.see(self.policy, text, self.name)
        lines = physical_lines(shown.text)
        choices = {b.line: play.label(b, lines) for b in shown.boundaries}
        line = line if line in choices else next(iter(choices), None)
        page = play.render_gates(shown, text, threshold, line)
        return page, gradio.update(choices=[(text, n) for n, text in choices.items()], value=line), shown

    def marked(self, shown: ShownFile | None, text: str, threshold: float, line: int | None) -> tuple[str]:
        """The same numbers with another threshold or line; the model is not asked."""
        if shown is None or not text.startswith(shown.text):
            return (gradio.skip(),)
        return (play.render_gates(shown, text, threshold, line),)

    def drawn(self, text: str, line: int | None, num_latents: int, seed: int) -> tuple[str]:
        """Latents before the chosen line."""
        if line is None:
            raise ValueError("`line` is not chosen; type code of two lines or more, and choose one.")
        return (play.render_latents(play.draw(self.policy, text, line, num_latents, seed)),)

    def others(self, text: str, line: int | None, num_latents: int, seed: int | None) -> tuple[str, int | None]:
        """Latents of the next seed."""
        following = seed if seed is None else int(seed) + 1  # an empty field is refused with the others
        return (*self.drawn(text, line, num_latents, following), following)

    def without(self, text: str, tokens: int, temperature: float, seed: int) -> tuple[str]:
        """What is written where no thought may stand."""
        written = play.complete(self.policy, text, "never", None, tokens, temperature, seed)
        return (play.render_completion(self.policy, text, written, "Without thinking"),)

    def thinking(self, text: str, threshold: float, tokens: int, temperature: float, seed: int) -> tuple[str]:
        """What is written with a thought wherever P(think) reaches the threshold."""
        written = play.complete(self.policy, text, "auto", threshold, tokens, temperature, seed)
        title = f"Thinking where P(think) is at least {threshold:.2f}"
        return (play.render_completion(self.policy, text, written, title),)

    # ---- the page ----

    def build(self) -> gradio.Blocks:
        """Lays out the page and ties its parts to what happens; one thing at a time, since there is one model."""
        with gradio.Blocks(title=f"ra3 play {self.name}", analytics_enabled=False) as page:
            gradio.Markdown(f"# {self.name}\nWhere this model would think, what it would think, and what that brings.")
            shown = gradio.State()
            error = gradio.Markdown(visible=False, elem_id="error", elem_classes="ra3")
            with gradio.Row():
                with gradio.Column(min_width=300):
                    text = gradio.Textbox(play.EXAMPLE, label="Code", lines=12, max_lines=24, elem_id="text")
                with gradio.Column(min_width=300):
                    gates = gradio.HTML(elem_id="gates")
            threshold = gradio.Slider(
                0, 1, THRESHOLD, step=0.01, label="Threshold: think where P(think) is at least", elem_id="threshold"
            )
            gradio.Markdown("## Thoughts before a line")
            with gradio.Row():
                line = gradio.Dropdown(label="Line", elem_id="line", min_width=260)
                count = gradio.Slider(
                    1, play.MOST_LATENTS, 8, step=1, label="How many", elem_id="count", min_width=160
                )
                seed = gradio.Number(42, label="Seed", precision=0, elem_id="seed", min_width=100)
            with gradio.Row():
                draw = gradio.Button("Draw thoughts", variant="primary", elem_id="draw")
                others = gradio.Button("Draw others", elem_id="others")
            latents = gradio.HTML(elem_id="latents")
            gradio.Markdown("## Going on from the end of the code, with and without")
            with gradio.Row():
                tokens = gradio.Slider(1, 256, 64, step=1, label="Most tokens, thoughts counted", elem_id="tokens")
                heat = gradio.Slider(0, 2, 0, step=0.05, label="Temperature (0: the likeliest token)", elem_id="heat")
            go = gradio.Button("Generate", variant="primary", elem_id="go")
            with gradio.Row():
                with gradio.Column(min_width=300):
                    never = gradio.HTML(elem_id="never")
                with gradio.Column(min_width=300):
                    auto = gradio.HTML(elem_id="auto")

            def tie(event: Any, function: Callable[..., tuple], inputs: list, outputs: list, **more: Any) -> Any:
                # One queue for all that asks the model.
                queue = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
                return event(_said(function, len(outputs)), inputs, [*outputs, error], **queue | more)

            # Of slider and keys the last state is what counts; marks need no model.
            live: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}
            mark = live | {"concurrency_id": "marks"}
            sees = ([text, threshold, line], [gates, line, shown])
            marks = ([shown, text, threshold, line], [gates])
            written = [text, threshold, tokens, heat, seed]
            tie(page.load, self.typed, *sees, show_progress="hidden")
            tie(text.change, self.typed, *sees, **live)  # gradio 6.31's `input` of a textbox never comes
            tie(threshold.input, self.marked, *marks, **mark)
            tie(line.change, self.marked, *marks, **mark)
            tie(draw.click, self.drawn, [text, line, count, seed], [latents])
            tie(others.click, self.others, [text, line, count, seed], [latents, seed])
            first = tie(go.click, self.without, [text, tokens, heat, seed], [never])
            tie(first.then, self.thinking, written, [auto])
            tie(threshold.release, self.thinking, written, [auto], trigger_mode="always_last")
        return page

    def launch(
        self, host: str | None = None, port: int | None = None, open_browser: bool = False, wait: bool = True
    ) -> gradio.Blocks:
        """Serves the page, until Ctrl-C if it is to `wait`. Without `host` and `port` they are gradio's, which a Space
        sets."""
        page = self.build()
        try:
            page.launch(
                server_name=host, server_port=port, inbrowser=open_browser, prevent_thread_lock=not wait, css=style(),
                theme=_THEME, ssr_mode=False, footer_links=[], share=False,
            )  # fmt: skip
        except OSError as error:
            raise ValueError(
                f"`port` is {port} and `host` {host!r}, where no page can be served; name others. ({one_line(error)})"
            ) from error
        return page
