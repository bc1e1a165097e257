"""What no report may show, and how it is taken out."""

import re
from collections.abc import Iterable

REMOVED = "(removed)"
SHORTEST = 4
"""Characters of a secret that is looked for everywhere: shorter ones are words."""

USERINFO = re.compile(r"(?<=://)[^/@\s\"']*@")
"""User and password in an address."""
KEYS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*-----|\Z)", re.DOTALL
)
NAMED = re.compile(
    r"""((?:password|passwd|secret|token|credential|authorization|api_?key)s?\b
    ["']?\s*[=:]\s*["']?)(?:(?:bearer|basic)\s+)?[^\s"',;}\]]+""",
    re.IGNORECASE | re.VERBOSE,
)
"""A value that is called a secret, in JSON, TOML, a variable or a sentence."""


def scrubbed(text: str, known: Iterable[str] = ()) -> str:
    """Return a text without secrets: those that are known, and what looks like one."""
    for secret in sorted(known, key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, REMOVED)
    text = KEYS.sub(REMOVED, text)
    text = USERINFO.sub("", text)
    return NAMED.sub(rf"\g<1>{REMOVED}", text)
