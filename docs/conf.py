"""Sphinx's configuration. Build: python -m sphinx -W --keep-going -b html docs docs/_build/html"""

import sys
from pathlib import Path
from urllib.request import urlopen

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent)]  # pages.py; the checkout that is documented

import pages  # noqa: E402

import gradsplit  # noqa: E402

project = "gradsplit"
author = "the gradsplit developers"
release = version = gradsplit.__version__
extensions = [
    "matplotlib.sphinxext.plot_directive",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",  # linkcode once there is a public repository to link to
]
exclude_patterns = ["_build", "generated/*.rst"]

autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_typehints = "none"  # the docstrings say it in words, and shorter
napoleon_numpy_docstring = False

# A name of ours that leads nowhere is an error; other projects' names need their inventories.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!gradsplit).*")]


def _reachable(inventories: dict[str, str]) -> dict[str, tuple[str, None]]:
    """Those that can be fetched now: a build without a network must not fail for its links."""
    found = {}
    for name, url in inventories.items():
        try:
            urlopen(f"{url}objects.inv", timeout=5).close()
        except OSError as error:
            print(f"no links to the documentation of {name}: {url} cannot be reached ({error})")
        else:
            found[name] = (url, None)
    return found


intersphinx_mapping = _reachable(
    {
        "python": "https://docs.python.org/3/",
        "torch": "https://docs.pytorch.org/docs/stable/",
    }
)

plot_formats = ["svg"]
plot_html_show_formats = plot_html_show_source_link = False
plot_rcparams = {
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
plot_apply_rcparams = True

html_theme = "furo"
html_show_copyright = False
html_math_renderer = "mathml"
html_title = f"gradsplit {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]

pages.write(here)


def setup(app):
    """MathML, which browsers show by themselves: MathJax would be fetched by every reader."""

    def inline(translator, node):
        translator.body.append(tex2mathml(node.astext()))
        raise nodes.SkipNode

    def block(translator, node):
        formula = tex2mathml(node.astext(), as_block=True)
        translator.body.append(f'<div class="formula">{formula}</div>')
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
