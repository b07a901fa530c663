"""MkDocs hook: links to files of the repository outside docs/ become text, since the site has no copy of them."""

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replaces `[text](path)` by `text` where the path leads out of docs/."""
    out = "../" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"\[([^\]]+)\]\({re.escape(out)}[^)]*\)", r"\1", markdown)
