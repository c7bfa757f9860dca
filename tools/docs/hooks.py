"""What MkDocs does not know of this repository: pages outside docs/, and fences with a marker or a file's name.

MkDocs calls the functions whose names begin with `on_`. A page of the repository outside docs/ has its own path in the
site, so links between pages are written for the repository, where they are read most, and turned here.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

# Beside this file: MkDocs looks there while it loads its hooks.
import command_line
import configuration

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = "docs/"
OUTSIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"examples/{name}/README.md" for name in ("recipes", "slurm", "scaling")),
)
"""Pages of the site that are not under docs/."""
MARKERS = {
    "gpu": "needs GPUs",
    "cluster": "needs a cluster",
    "download": "downloads",
}
"""What a marker of a block says to its reader; `tested-by` says nothing, the block runs anywhere."""

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"^(?P<fence> *```)(?P<language>\w+) +(?P<info>\S.*)$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put how-to pages that the menu does not name behind those that it does."""
    (section,) = (entry["How-to"] for entry in config.nav if "How-to" in entry)
    listed = str(section)
    pages = sorted(path.name for path in (ROOT / DOCS / "how-to").glob("*.md"))
    section += [f"how-to/{name}" for name in pages if f"'how-to/{name}'" not in listed]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is made here, the pages outside docs/, and the files of the repository that any page links to."""
    from mkdocs.structure.files import File

    for path, content in made_pages().items():
        files.append(File.generated(config, path, content=content))
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for page in [*files.documentation_pages()]:
        for target in linked_files(repository_path(page.src_uri), page.content_string):
            if target not in OUTSIDE and not target.startswith(DOCS) and target not in files.src_uris:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return titled_fences(site_links(markdown, page.file.src_uri))


def made_pages() -> dict[str, str]:
    """Pages that are made of the program at each build, so that they cannot say anything else than it does."""
    return {"reference/configuration.md": configuration.page(), "reference/command-line.md": command_line.page()}


def repository_path(src_uri: str) -> str:
    """Where a page of the site lies in the repository."""
    return src_uri if src_uri in OUTSIDE else DOCS + src_uri


def linked_files(path: str, markdown: str) -> list[str]:
    """Files of the repository that a page links to, as paths from its root."""
    targets = {_target(path, match[1]) for match in _LINK.finditer(markdown)}
    return sorted(target for target in targets if (ROOT / target).is_file())


def site_links(markdown: str, src_uri: str) -> str:
    """Links as the site has them: docs/ is its root, and the rest of the repository lies beside docs' own pages."""
    path = repository_path(src_uri)

    def turned(match: re.Match[str]) -> str:
        target = _target(path, match[1]).removeprefix(DOCS)
        return posixpath.relpath(target, posixpath.dirname(src_uri) or ".") + (match[2] or "")

    return _LINK.sub(turned, markdown)


def titled_fences(markdown: str) -> str:
    """A block that is a file, or is marked, says so above it: ```` ```bash {.gpu} ```` -> `title="needs GPUs"`."""

    def titled(match: re.Match[str]) -> str:
        marker = re.match(r"\{\.(\w+)", match["info"])
        title = match["info"] if marker is None else MARKERS.get(marker[1], "")
        return f"{match['fence']}{match['language']}" + (f' title="{title}"' if title else "")

    return _FENCE.sub(titled, markdown)


def _target(path: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
