"""Settings of Sphinx for these pages; `make docs` builds them."""

from __future__ import annotations

import importlib
import pkgutil

from docutils import nodes
from sphinx.util import logging

import chainer_deform  # before Chainer, which the pages' pictures import

LOGGER = logging.getLogger(__name__)

project = 'chainer_deform'
version = release = chainer_deform.__version__

extensions = [
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.mathjax',
    'matplotlib.sphinxext.plot_directive',
]
exclude_patterns = ['_build']
html_theme = 'furo'
html_title = f'{project} {version}'
html_static_path = ['style.css']
html_css_files = ['style.css']
html_copy_source = False
html_show_copyright = False

autodoc_member_order = 'bysource'
autodoc_inherit_docstrings = False  # Chainer's pages have Chainer's methods
autodoc_typehints = 'none'  # the docstrings have shapes and units besides
napoleon_use_ivar = True  # attributes as a list
plot_html_show_source_link = False
plot_html_show_formats = False
plot_formats = [('png', 150)]
plot_rcparams = {'figure.constrained_layout.use': True, 'font.size': 9}
plot_apply_rcparams = True

# Words of the docstrings' types that are no classes, as in 'pair of ints'.
nitpick_ignore_regex = [('py:class', '[a-z]+')]

#: Where others document what the docstrings name. Their inventories would have to be
#: downloaded for each build; the addresses follow from the names as well.
PAGES = {
    'chainer.': 'https://docs.chainer.org/en/stable/reference/generated/{}.html',
    'matplotlib.': 'https://matplotlib.org/stable/api/_as_gen/{}.html',
    'numpy.': 'https://numpy.org/doc/stable/reference/generated/{}.html',
    'onnx.': 'https://onnx.ai/onnx/api/index.html',
}
#: What has no page of its own in Chainer's.
PLACES = {
    'chainer.utils.type_check.InvalidType': 'guides/type_checks.html',
    'initializer': 'reference/initializers.html#initializer',
    'ndarray': 'reference/variable.html#ndarray',
}


def link_elsewhere(app, env, node, contnode):
    """Resolves a name that is documented elsewhere."""
    target = node['reftarget']
    uris = [
        page.format(target) for start, page in PAGES.items() if target.startswith(start)
    ]
    if target in PLACES:
        uris = ['https://docs.chainer.org/en/stable/' + PLACES[target]]
    if not uris:
        return None
    return nodes.reference('', '', contnode, internal=False, refuri=uris[0])


def check_reference(app, env):
    """Warns of public names, those in an __all__, that the reference leaves out."""
    documented = env.get_domain('py').objects
    modules = [chainer_deform]
    for info in pkgutil.iter_modules(chainer_deform.__path__, 'chainer_deform.'):
        if '._' not in info.name:
            modules.append(importlib.import_module(info.name))
    for module in modules:
        for name in getattr(module, '__all__', ()):
            full_name = f'{module.__name__}.{name}'
            if callable(getattr(module, name)) and full_name not in documented:
                LOGGER.warning('%s is not in the reference', full_name)


def setup(app):
    app.connect('missing-reference', link_elsewhere)
    app.connect('env-check-consistency', check_reference)
