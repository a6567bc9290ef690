"""Makes a site of the pages: `README.md` is its front page, and what pages link to beside `docs/` goes along.

MkDocs calls these functions, see `mkdocs.yml`. Pages stay plain Markdown whose links work on any forge.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
    "assets/LICENSES.md": "LICENSES.md",
}
"""Pages of the site that are not in `docs/`: their file, and their name in the site."""
OTHERS = "files"
"""Folder of the site for what else pages link to: pictures, sources."""
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")
"""Path of a link in Markdown, without the heading that it may name."""


def target(link: str, page: str) -> str | None:
    """The file that a link leads to, from the root of the tree; `None` where it leads out of it.

    Args:
        link: Path of the link.
        page: The file it stands in, from the root of the tree.
    """
    if "://" in link or link.startswith("mailto:"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def address(file: str) -> str:
    """Give the place of one of the tree's files in the site."""
    return BESIDE.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else f"{OTHERS}/{file}")


def rewrite(text: str, page: str) -> str:
    """A page whose links lead to where files are in the site."""
    start = posixpath.dirname(address(page))

    def replaced(found: re.Match[str]) -> str:
        file = target(found[1], page)
        return found[1] if file is None else posixpath.relpath(address(file), start or ".")

    return LINK.sub(replaced, text)


def linked(root: Path, page: str) -> set[str]:
    """Files of the tree that a page links to and that are no pages themselves."""
    files = {target(link, page) for link in LINK.findall((root / page).read_text(encoding="utf-8"))}
    return {file for file in files if file and file not in BESIDE and not file.startswith("docs/")}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages beside `docs/`, and what pages link to."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    others = {other for file in files.documentation_pages() for other in linked(root, f"docs/{file.src_uri}")}
    for page, name in BESIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(root / page)))
        others |= linked(root, page)
    for other in sorted(others):
        files.append(File.generated(config, address(other), abs_src_path=str(root / other)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page to where files are in the site."""
    beside = {name: file for file, name in BESIDE.items()}
    uri = page.file.src_uri
    return rewrite(markdown, beside.get(uri, f"docs/{uri}"))
