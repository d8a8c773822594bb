"""The site: Sphinx with furo and MyST.

Build it with ``python -m sphinx -W --keep-going -n -b html docs build/site``.
"""

import importlib.metadata
import importlib.util
from pathlib import Path

project = "miss"
release = version = importlib.metadata.version("miss-torch")
language = "en"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_parser"]
exclude_patterns = ["static"]

# Pages.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # headings can be linked as on GitHub: page.md#words-of-the-heading

# Docstrings.
default_role = "py:obj"  # a name between single backticks is a link
add_module_names = False
maximum_signature_line_length = 88  # longer ones have a line for each parameter
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_custom_sections = ["Shape"]
napoleon_use_ivar = True
napoleon_use_param = False  # one line may describe several parameters
napoleon_use_rtype = False
# Names of torch, Python and others, which have no page here, type variables, and internal names.
nitpick_ignore_regex = [
    ("py:obj", r"at"),
    ("py:.*", r"(nn|torch|typing|os|re|collections|peft)\..*"),
    ("py:.*", r"(miss\..*\.)?(Model|Self)"),
    ("py:.*", r"Any|Callable|Iterable|Iterator|Linear|Mapping|Module|NamedTuple|Parameter"),
    ("py:.*", r"PathLike|Tensor|state_dict|str"),
]

# HTML. MathJax is one file, served from the site itself. Its menu offers speech, for which it would
# load more.
html_theme = "furo"
html_title = f"miss {release}"
html_copy_source = html_show_copyright = html_show_sourcelink = False
package = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
mathjax = package / "static" / "mathjax" / "tex-svg.js"
html_static_path = ["static", str(mathjax)]
html_css_files = ["site.css"]
mathjax_path = mathjax.name
mathjax3_config = {"options": {"enableMenu": False}}
# The figures' colour of MiSSe, and a lighter one for the dark pages.
brand = ("color-brand-primary", "color-brand-content")
html_theme_options = {
    "light_css_variables": dict.fromkeys(brand, "#a83f00"),
    "dark_css_variables": dict.fromkeys(brand, "#f08a4b"),
}


def public_name(app, env, node, contnode):
    """A name in a docstring, as `inject` or `forward`, that is one of ours elsewhere.

    It may be in another module, or in what every adapted layer has.
    """
    python, page = env.domains["py"], node.get("refdoc")
    for home in ("miss", "miss.AdaptedLayer", "miss.forms"):
        target = f"{home}.{node.get('reftarget')}"
        found = python.resolve_xref(env, page, app.builder, "obj", target, node, contnode)
        if node.get("refdomain") == "py" and found is not None:
            return found
    return None


def public_bases(app, name, obj, options, bases):
    """In the place of a private base class, which has no page, that class's own bases."""
    while private := [base for base in bases if base.__name__.startswith("_")]:
        place = bases.index(private[0])
        bases[place : place + 1] = private[0].__bases__


def setup(app):
    """Extend Sphinx."""
    app.connect("missing-reference", public_name)
    app.connect("autodoc-process-bases", public_bases)
