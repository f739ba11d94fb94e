"""The site: `make docs` writes it to build/docs/index.html, and any warning is an error."""

import re
from importlib import metadata
from pathlib import Path
from typing import Any

from sphinx.addnodes import pending_xref

REPOSITORY = Path(__file__).resolve().parent.parent


project = "loratrf-deploy"
release = version = metadata.version(project)
html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
exclude_patterns = ["_build"]
extensions = ["myst_parser", "sphinx.ext.autodoc"]

myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a page that begins below its title, as an included one does

# Names between single backquotes, as docstrings here have them.
default_role = "code"
smartquotes = False  # they make a dash of an option's two
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False, "class-doc-from": "class"}


def _plain(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `code`: what reST would take for markup of its own is escaped."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        lines[number] = "".join(
            part.replace("\\", "\\\\") if part.startswith("`") else re.sub(r"([\\*|_])", r"\\\1", part)
            for part in parts
        )


# Pages of the repository that are pages of the site.
_PAGES = {"README.md": "index", "SECURITY.md": "security", "CHANGELOG.md": "changes"}


def _link(app: Any, tree: Any) -> None:
    """What README and pages link to of the repository is the site's page of it, or else its name alone."""
    for node in [node for node in tree.findall(pending_xref) if node["reftype"] == "myst"]:
        path = REPOSITORY / node["reftarget"].removeprefix("../")
        file = next((file for file in (path, path.with_suffix(".md")) if file.exists()), None)
        if file is None or (node["refdomain"] == "doc" and not Path(node["reftarget"]).is_absolute()):
            continue
        page = _PAGES.get(file.name if file.parent == REPOSITORY else "")
        if page:
            node.attributes |= {"refdomain": "doc", "reftarget": page, "reftargetid": node.get("reftargetid")}
        else:
            node.replace_self(node.children)


def setup(app: Any) -> None:
    app.connect("doctree-read", _link)
    app.connect("autodoc-process-docstring", _plain)
