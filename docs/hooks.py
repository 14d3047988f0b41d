"""What mkdocs does beside Markdown for this site: links into the repository, its pictures, and mathematics.

Pages link to files outside of docs/ by relative paths, as readers of the repository need them. On the site these are
links to the repository's host, and pictures among them are copied. Formulas become MathML, which browsers draw without
a script, and without asking another server for one.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
#: The target of a link or picture that leaves docs/, with the mark of a picture before it.
OUTSIDE = re.compile(r"(?P<picture>!?)(?P<label>\[[^\]]*\])\((?P<target>\.\./[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
#: A formula as pymdownx.arithmatex leaves it.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures of the benchmarks to the site."""
    for path in sorted((ROOT / "bench" / "results").glob("*.png")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links to files of the repository at its host, and pictures at their copies."""

    def replace(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", found["target"]))
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri}: there is no {found['target']}")
        if found["picture"]:
            return f"!{found['label']}({path})"
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{found['label']}({config.repo_url.rstrip('/')}/{kind}/main/{path}{found['anchor'] or ''})"

    return OUTSIDE.sub(replace, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Replace formulas by MathML."""

    def replace(found: re.Match[str]) -> str:
        source = html.unescape(found[3]).strip()
        drawn: str = convert(source, display="block" if found[2] == "[" else "inline")
        # The converter passes on what it does not know.
        if "\\" in drawn or "<mi>&</mi>" in drawn:
            raise PluginError(f"{page.file.src_uri}: a formula cannot be converted: {source}")
        return drawn

    drawn = FORMULA.sub(replace, content)
    if 'class="arithmatex"' in drawn:
        raise PluginError(f"{page.file.src_uri}: a formula was not found by the pattern")
    return drawn
