"""MkDocs hooks: the options of the configuration as lists, and links that lead out of docs/ as text."""

import ast
import re
from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Replaces `{{ options }}` by the options, and `[text](path)` by `text` where the site has no copy of the file."""
    if "{{ options }}" in markdown:
        source = Path(config.docs_dir).parent / "src" / "hippoformer" / "configuration.py"
        markdown = markdown.replace("{{ options }}", _options(source.read_text(encoding="utf-8")))
    out = "../" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"\[([^\]]+)\]\({re.escape(out)}[^)]*\)", r"\1", markdown)


def _options(source: str) -> str:
    """The groups of the configuration's docstring as headings, their options as list items."""
    docstring = next(ast.get_docstring(node) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)) or ""
    groups = docstring.partition("\n\n")[2].partition("\nRaises:")[0]
    groups = re.sub(r"^(\w.*):$", r"\n## \1\n", groups, flags=re.MULTILINE)
    return re.sub(r"^ {4}(\w[\w, ]*): ", lambda found: f"- `{found[1]}`: ", groups, flags=re.MULTILINE)
