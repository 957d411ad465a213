"""Secrets out of text that is kept or sent: credentials and query strings of URLs, keys and tokens."""

import re

HIDDEN = "***"
# One slash is left of two where a URL was taken for a path.
_SCHEME = r"\b[a-z][a-z0-9+.-]+:/{1,2}"
_NAME = r"\w*(?:api[_-]?key|token|password|passwd|secret|access[_-]?key|credentials?)"
_VALUE = r"(?!\d+\b)[^\s\"',;&]{6,}"
# What is replaced, and by what; 40 hexadecimal digits alone are left: they are mostly git commits.
_PATTERNS = (
    (rf"({_SCHEME})[^\s/?#'\"<>|]*@(?=[^\s'\"<>|]|$)", rf"\1{HIDDEN}@"),
    (rf"({_SCHEME}[^\s?'\"<>|]*\?)[^\s'\"<>|]+", rf"\1{HIDDEN}"),
    (r"\b(?:hf|wandb_v1|gh[pousr]|github_pat)_[A-Za-z0-9_-]{16,}", HIDDEN),
    (r"\b(?:sk|glpat)-[A-Za-z0-9_-]{16,}|\b(?-i:AKIA[0-9A-Z]{16})\b|\blocal-[0-9a-f]{40}\b", HIDDEN),
    (r"(\bBearer\s+)\S{8,}", rf"\1{HIDDEN}"),
    (r"(\bapi[ _-]?key\W+)[0-9a-f]{40}\b", rf"\1{HIDDEN}"),
    (rf"({_NAME}\b[\"']?\s*[=:]\s*[\"']?|--{_NAME}\s+[\"']?){_VALUE}", rf"\1{HIDDEN}"),
)
_COMPILED = [(re.compile(pattern, re.IGNORECASE), replacement) for pattern, replacement in _PATTERNS]


def redacted(text: str) -> str:
    """`text` without the secrets that their looks give away.

    `https://user:pw@host/x?token=abc&size=3` becomes `https://***@host/x?***`; URLs without credentials and
    query stay as they are.
    """
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text
