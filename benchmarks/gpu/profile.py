"""`python -m benchmarks.gpu.profile --size h200 --out FILE`: all that a call on a lent GPU has to say, in 8 minutes.

Parts, in this order, each row written to `--out` as soon as it is measured; what there is no time for is named in
`left`: engines and packed rows against plain forwards in float32 and bfloat16 (`exact`), an M-update by attention
(`mstep`) and an E-update (`estep`) with seconds, tokens, share of the machine's peak and memory. Weights are random.
`--size toy` is the same on a CPU in seconds; the tests run it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ra3_trl import RA3Config
from ra3_trl.em import EStep, Gradients, check_packing, mstep_loss, pack
from ra3_trl.policy import Policy
from ra3_trl.records import Document
from ra3_trl.rollout import (
    FORWARD_ERRORS,
    Backbone,
    BranchEngine,
    EngineCheck,
    ExpandEngine,
    NoiseKey,
    SamplingParams,
    evaluating,
    in_a_line,
    largest,
)
from ra3_trl.segmentation import PYTHON, Segmenter, build_token_table, splice, standard_library

from ..common import say
from ..launches import train_tokenizer


# Dense bfloat16 operations a second, from the makers' data sheets.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """Shape of the model that is timed, and of an update. The one that is checked is four layers of it at most."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    intermediate: int
    vocab: int
    documents: int
    tokens: int
    num_latents: int
    latent_tokens: int
    repeats: int


SIZES = {
    "h200": Size(24, 896, 14, 2, 4864, 151_936, 8, 1024, 8, 16, 3),  # 0.5B, as Qwen2.5-0.5B
    "toy": Size(2, 32, 4, 2, 64, 700, 2, 128, 2, 4, 1),
}


def make_model(size: Size, layers: int, attention: str = "sdpa") -> PreTrainedModel:
    config = AutoConfig.for_model(
        "qwen2", hidden_size=size.hidden, num_hidden_layers=layers, num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads, intermediate_size=size.intermediate, vocab_size=size.vocab,
        max_position_embeddings=4 * size.tokens, bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@dataclass
class Meter:
    """Counts what the decoder runs, and the seconds and memory of what is inside `measuring`."""

    model: PreTrainedModel
    device: torch.device
    seconds: float = 0.0
    tokens: int = 0  # without gradients
    learned: int = 0  # with

    def __post_init__(self) -> None:
        self.weights = sum(p.numel() for p in self.model.parameters())
        self.model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.learned += kwargs["input_ids"].numel()
        else:
            self.tokens += kwargs["input_ids"].numel()

    def measure(self, work: Callable[[], Any]) -> Any:
        self.tokens = self.learned = 0
        _settle(self.device)
        begin = time.perf_counter()
        result = work()
        _settle(self.device)
        self.seconds = time.perf_counter() - begin
        return result

    def row(self, peak: float | None) -> dict[str, Any]:
        """2 operations a weight and token, 6 with the backward pass; attention and heads are not counted."""
        operations = self.weights * (2 * self.tokens + 6 * self.learned)
        return {
            "seconds": self.seconds, "tokens": self.tokens, "tokens_with_gradients": self.learned,
            "share_of_peak": operations / self.seconds / peak if peak else None, "memory_gb": _memory(self.device),
        }  # fmt: skip


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _memory(device: torch.device) -> float | None:
    """The most that was ever allocated since the part began; `None` on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None


@dataclass
class Profile:
    """What the parts share: sizes, device, tokenizer, documents, and the time that is left."""

    size: Size
    device: torch.device
    end: float
    out: Path | None
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = self.size
        self.tokenizer = train_tokenizer(min(size.vocab, 2048) - 1, "shutil.py")
        text = (standard_library() / "shutil.py").read_text("utf-8")
        chunks = Segmenter(self.tokenizer, PYTHON, size.tokens, "strip")(0, text)
        full = [chunk for chunk in chunks if len(chunk.input_ids) > 0.8 * size.tokens and chunk.boundaries]
        self.documents: list[Document] = [full[i % len(full)] for i in range(size.documents)]
        name = torch.cuda.get_device_name(0) if self.device.type == "cuda" else "cpu"
        self.peak = next((peak for key, peak in PEAK.items() if key in name), None)
        self.found |= {"device": name, "peak": self.peak, "size": asdict(size), "left": []}
        self.found |= {"torch": torch.__version__, "transformers": transformers.__version__}

    def run(self, parts: dict[str, Callable[[Profile], Iterator[tuple[str, Any]]]]) -> dict[str, Any]:
        """Runs parts in turn, row by row, as long as there is time; a row that fails is told of, the others go on."""
        for name, part in parts.items():
            rows: dict[str, Any] = self.found.setdefault(name, {})
            for key, measure in part(self):
                if time.monotonic() > self.end:
                    self.found["left"].append(f"{name}/{key}")
                    continue
                begin = time.monotonic()
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                try:
                    rows[key] = measure()
                except FORWARD_ERRORS as error:
                    rows[key] = {"error": in_a_line(error)}
                rows[key] |= {"wall": round(time.monotonic() - begin, 2)}
                say(f"{name}/{key}: {rows[key]}")
                gc.collect()
                self.save()
        return self.found

    def save(self) -> None:
        if self.out is not None:
            aside = self.out.with_suffix(".part")
            aside.write_text(json.dumps(self.found, indent=1) + "\n", "utf-8")
            os.replace(aside, self.out)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Mixed precision as the trainer's on a GPU; float32 on a CPU."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            yield

    @property
    def attentions(self) -> list[str]:
        """What there is here: flex attention's backward has no CPU kernel, flash attention is a package."""
        more = ["flex_attention"] if self.device.type == "cuda" else []
        flash = ["flash_attention_2"] if transformers.utils.is_flash_attn_2_available() else []
        return ["sdpa", *more, *flash]


# ---- exact ----


def exact(profile: Profile) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for dtype in DTYPES:
        for kind in (BranchEngine, ExpandEngine):
            yield f"{kind.name}/{dtype}", lambda kind=kind, dtype=dtype: engine_row(profile, kind, dtype)
        for attention in profile.attentions:
            yield f"packing/{attention}/{dtype}", lambda a=attention, d=dtype: packing_row(profile, a, d)


def engine_row(profile: Profile, kind: type[BranchEngine] | type[ExpandEngine], dtype: str) -> dict[str, Any]:
    """Largest difference to plain forwards of every kind of number, in nats, and the bound that `auto` has."""
    size = profile.size
    model = make_model(size, min(size.layers, 4)).to(profile.device, DTYPES[dtype])
    backbone = Backbone(model)
    table = build_token_table(profile.tokenizer, backbone.vocab_size)
    with torch.no_grad(), evaluating(model):
        check = EngineCheck(backbone, table, SamplingParams(size.latent_tokens))
        engine = kind(backbone, table, check.params)
        expected, actual = check.both(engine)
        differences = largest(expected, actual)
    gradient = _gradients(engine, check)
    slow = _gradients(ExpandEngine(backbone, table, check.params), check)
    scale = max(float(g.abs().max()) for g in slow.values())
    worst = max(float((gradient[name] - g).abs().max()) for name, g in slow.items()) / scale
    right = max(differences.values()) <= check.bound
    return {"exact": right, "bound": check.bound, "differences": differences, "gradient_difference": worst}


def _gradients(engine: BranchEngine | ExpandEngine, check: EngineCheck) -> dict[str, torch.Tensor]:
    """Gradients of all log-probs of the check's latents."""
    model = engine.backbone.causal_lm
    model.zero_grad(set_to_none=True)
    with engine.gradients():
        logps = engine.packed_log_probs([(group, slice(0, len(group.boundaries))) for group in check.made_up])
        sum(one.gate_T.sum() + one.token_n.sum() for one in logps).backward()
    return {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}


def packing_row(profile: Profile, attention: str, dtype: str) -> dict[str, Any]:
    """Whether packing is exact, and by how much loss and gradients of packed rows differ from those of rows apart."""
    size = profile.size
    model = make_model(size, min(size.layers, 4), attention).to(profile.device, DTYPES[dtype])
    backbone, losses, gradients = Backbone(model), [], []
    check_packing(backbone, size.tokens, packing=True)
    packs = backbone.packs
    short = [splice(d, {}) for d in _short_documents(profile)]
    for backbone.packs in (packs, False):
        model.zero_grad(set_to_none=True)
        loss = mstep_loss(backbone, pack(short, size.tokens, True), 100.0)[0]
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None})
    scale = max(float(g.abs().max()) for g in gradients[1].values())
    worst = max(float((gradients[0][name] - g).abs().max()) for name, g in gradients[1].items()) / scale
    return {"packs": packs, "loss_difference": abs(losses[0] - losses[1]), "gradient_difference": worst}


def _short_documents(profile: Profile) -> list[Document]:
    """Several to a row."""
    text = (standard_library() / "textwrap.py").read_text("utf-8")
    return Segmenter(profile.tokenizer, PYTHON, profile.size.tokens // 3, "strip")(1, text)[:4]


# ---- seconds, share of peak, memory ----


def mstep(profile: Profile) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for attention in profile.attentions:
        for packing in (True, False):
            name = f"{attention}/{'packed' if packing else 'apart'}"
            yield name, lambda a=attention, p=packing: mstep_row(profile, a, p)


def mstep_row(profile: Profile, attention: str, packing: bool) -> dict[str, Any]:
    """An M-update without its optimizer: the best of some, after one that warms up and compiles."""
    size = profile.size
    model = make_model(size, size.layers, attention).to(profile.device).train()
    backbone, meter = Backbone(model), Meter(model, profile.device)
    backbone.packs = packing
    rows = pack([splice(d, {}) for d in _thirds(profile)], size.tokens, packing)

    def update() -> None:
        model.zero_grad(set_to_none=True)
        with profile.precision():
            loss = mstep_loss(backbone, rows, float(rows.num_tokens))[0]
        loss.backward()

    return _best(profile, meter, update)


def _thirds(profile: Profile) -> list[Document]:
    """Three times as many documents of a third of the length: rows of several."""
    texts = [(standard_library() / name).read_text("utf-8") for name in ("shutil.py", "textwrap.py")]
    cut = Segmenter(profile.tokenizer, PYTHON, profile.size.tokens // 3, "strip")
    chunks = [chunk for i, text in enumerate(texts) for chunk in cut(i, text)]
    return [chunks[i % len(chunks)] for i in range(3 * profile.size.documents)]


def estep(profile: Profile) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "rollout", lambda: estep_row(profile, learns=False)
    yield "update", lambda: estep_row(profile, learns=True)


def estep_row(profile: Profile, learns: bool) -> dict[str, Any]:
    """An E-update without its optimizer and reference, all of it or its rollouts alone."""
    size = profile.size
    model = make_model(size, size.layers).to(profile.device)
    backbone, meter = Backbone(model), Meter(model, profile.device)
    args = RA3Config(
        use_cpu=profile.device.type == "cpu", report_to="none", max_length=2 * size.tokens, kl_coef=0.0,
        num_latents=size.num_latents, max_latent_length=size.latent_tokens, gate_hold="never", bf16=False,
    )  # fmt: skip
    table = build_token_table(profile.tokenizer, backbone.vocab_size)
    engine = BranchEngine(backbone, table, SamplingParams(size.latent_tokens), args.max_branch_tokens)
    policy = Policy(engine, args)
    policy.autocast = profile.precision
    step = EStep(policy, args)
    boundaries = 0

    def update() -> None:
        nonlocal boundaries
        with policy.inference(whole=False):
            rollouts = step.roll_out(profile.documents, NoiseKey(0, 0, 0))
        boundaries = sum(len(rollout.group.boundaries) for rollout in rollouts)
        if learns:
            model.train().zero_grad(set_to_none=True)
            with profile.precision():
                step.backward(rollouts, float(boundaries), False, Gradients(lambda loss: loss.backward()))

    return _best(profile, meter, update) | {"boundaries": boundaries}


def _best(profile: Profile, meter: Meter, update: Callable[[], None]) -> dict[str, Any]:
    meter.measure(update)
    first, found = meter.seconds, list[dict[str, Any]]()
    while len(found) < profile.size.repeats and (not found or time.monotonic() < profile.end):
        meter.measure(update)
        found.append(meter.row(profile.peak))
    return min(found, key=lambda row: row["seconds"]) | {"first_seconds": first, "weights": meter.weights}


PARTS: dict[str, Callable[[Profile], Iterator[tuple[str, Any]]]] = {"exact": exact, "mstep": mstep, "estep": estep}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.profile", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="h200")
    parser.add_argument(
        "--seconds", type=float, default=440.0, help="begins no row after these (default: %(default)s)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="a JSON file, written anew after each row")
    parser.add_argument("--json", action="store_true", help="print what was found as one JSON object at the end")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    profile = Profile(SIZES[args.size], device, time.monotonic() + args.seconds, args.out)
    found = profile.run({name: PARTS[name] for name in args.parts})
    if args.json:
        json.dump(found, sys.stdout)
        print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
