"""Licences as rows name them, and as a card's metadata must: by the Hub's identifiers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


# https://huggingface.co/docs/hub/repositories-licenses; a card with another `license` is refused by the Hub.
_KNOWN = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl apple-ascl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa
unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 gemma unknown other
"""
HUB_LICENSES = frozenset(_KNOWN.split())
_MISSING = {"", "unknown", "none", "null", "n/a", "noassertion", "no license", "no_license", "unlicensed"}


def row_license(value: str | Iterable[str] | None) -> str | None:
    """The licence that a row's cell names, `None` where it names none; a list of licences is joined by `AND`.

    Example: `row_license(["MIT", "Apache-2.0"]) == "MIT AND Apache-2.0"`, `row_license("unknown") is None`.
    """
    names = [value] if isinstance(value, str) else list(value or ())
    stripped = [name.strip() for name in names if isinstance(name, str)]
    return " AND ".join(name for name in stripped if name.lower() not in _MISSING) or None


def hub_license(name: str) -> str:
    """The Hub's identifier of one licence, `"other"` where the Hub knows none.

    Example: `hub_license("GPL-3.0-or-later") == "gpl-3.0"`, `hub_license("The MIT License (MIT)") == "mit"`.
    """
    name = name.strip().lower()
    if name in HUB_LICENSES:
        return name
    words = re.sub(r"\b(the|licen[cs]e|version)\b|\([^)]*\)?|[,\"')]", " ", name).split()
    short = re.sub(r"(-only|-or-later|\+)$", "", "-".join(words))
    return short if short in HUB_LICENSES else "other"


def license_metadata(names: Iterable[str]) -> dict[str, Any]:
    """`license`, and `license_name` for the only one that the Hub does not know, as a card's metadata has them.

    `names` are SPDX tags, expressions of them, or words; without any there is nothing to say (`{}`).
    """
    singles = [single for name in names for single in re.split(r"\s+(?:AND|OR|WITH)\s+", name.strip()) if single]
    ids = sorted({hub_license(single.lstrip("(")) for single in singles})
    if len(set(singles)) == 1 and ids == ["other"]:
        slug = re.sub(r"[^a-z0-9.]+", "-", singles[0].lower()).strip("-.")[:64]
        return {"license": "other", "license_name": slug} if slug else {"license": "other"}
    return {"license": ids[0] if len(ids) == 1 else ids} if ids else {}
