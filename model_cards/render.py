"""Renders every card here from the facts beside it: `python model_cards/render.py`."""

import json
from pathlib import Path

from ra3_trl.hub import ModelCardFacts, render_model_card


for path in sorted(Path(__file__).parent.glob("*.json")):
    render_model_card(ModelCardFacts(**json.loads(path.read_text("utf-8")))).save(path.with_suffix(".md"))
