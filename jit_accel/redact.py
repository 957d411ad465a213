"""Secrets out of text that is kept or sent: credentials and query strings of URLs, keys and tokens."""

from __future__ import annotations

import re

HIDDEN = "***"
_NAME = r"(?:api[_-]?key|token|password|passwd|secret|access[_-]?key|credentials?)\w*"
# One slash is left of two where a URL was taken for a path.
_URL_END = r"[^\s'\"<>|]"
# What is replaced, and by what; 40 hexadecimal digits are left alone: they are mostly git commits.
_PATTERNS = (
    (re.compile(rf"(\b[a-z][a-z0-9+.-]+:/{{1,2}})[^\s/?#'\"<>|]*@(?={_URL_END}|$)", re.IGNORECASE), rf"\1{HIDDEN}@"),
    (re.compile(rf"(\b[a-z][a-z0-9+.-]+:/{{1,2}}[^\s?'\"<>|]*\?){_URL_END}+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:hf|wandb_v1)_[A-Za-z0-9_-]{16,}"), HIDDEN),
    (
        re.compile(rf"({_NAME}[\"']?\s*[=:]\s*|--\w*{_NAME}\s+)[\"']?[^\s\"',;&]+[\"']?", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
)


def redacted(text: str) -> str:
    """`text` without the secrets that can be told by their looks.

    `https://user:pw@host/x?token=abc&size=3` becomes `https://***@host/x?***`; URLs without credentials and
    query stay as they are.
    """
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
