"""Pushes the checkpoints of `collection.yaml` and makes the collection: `python model_cards/push.py ORG FOLDER`.

Each stands in a folder of its name in FOLDER, with the card that its run wrote. Private unless `--public`: the cards
are to be read on the Hub before others see them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

from ra3_trl.outgoing import check_upload, process_tokens


LAYOUT = Path(__file__).with_name("collection.yaml")


def read_layout() -> dict[str, Any]:
    """Reads title, description and items."""
    return yaml.safe_load(LAYOUT.read_text("utf-8"))


def push(org: str, folder: Path, api: Any, private: bool = True) -> str:
    """Pushes all items and returns the collection's slug.

    Raises:
        `ValueError`: before anything is pushed, if one is not there or has no card.
    """
    layout = read_layout()
    models = [item for item in layout["items"] if item["type"] == "model"]
    ignored: dict[str, list[str]] = {}
    for item in models:  # all are looked at before one leaves
        place = folder / item["name"]
        if not (place / "README.md").is_file():
            raise ValueError(f"{str(place)!r} has no README.md; make the checkpoint by `{item['made_by']}`.")
        ignored[item["name"]] = check_upload(place, process_tokens(), ["checkpoint-*"])
    collection = api.create_collection(
        layout["title"], namespace=org, description=layout["description"], private=private, exists_ok=True
    )
    for item in models:
        api.create_repo(f"{org}/{item['name']}", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=f"{org}/{item['name']}",
            folder_path=str(folder / item["name"]),
            ignore_patterns=ignored[item["name"]],
        )
    for item in layout["items"]:  # data sets are pushed by the command that makes them, with a card of their own
        api.add_collection_item(
            collection.slug, f"{org}/{item['name']}", item["type"], note=item["note"], exists_ok=True
        )
    return str(collection.slug)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("org", metavar="ORG")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--public", action="store_true")
    options = parser.parse_args()
    print(f"https://huggingface.co/collections/{push(options.org, options.folder, HfApi(), not options.public)}")


if __name__ == "__main__":
    main()
