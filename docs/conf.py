"""How Sphinx makes the site of documentation: `make site`."""

from __future__ import annotations

from importlib.metadata import version as version_of

project = "lorac-deploy"
version = release = version_of(project)
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["results"]  # plots that pages show; no pages
templates_path: list[str] = []

# A page of Markdown is the same in the repository's viewer and here: links go to files, anchors are made from headings.
myst_heading_anchors = 3

# Docstrings: `name` is the object of that name, where the reference has it. Types stand in the signature.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "__init__, __new__"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
add_module_names = False
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "lorac-deploy"
html_show_sphinx = False
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
