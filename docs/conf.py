"""Settings of Sphinx for these pages; `make docs` builds them."""

from __future__ import annotations

import importlib
import os
import pathlib
import pkgutil
import re
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.util import logging

# The small models that the pages train gain nothing from threads. It has to be said
# before NumPy is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import chainer_deform  # isort: skip  (before chainer, which the pictures import)

MATHML = '{http://www.w3.org/1998/Math/MathML}'
ElementTree.register_namespace('', MATHML[1:-1])

LOGGER = logging.getLogger(__name__)

project = 'chainer_deform'
version = release = chainer_deform.__version__

extensions = [
    'sphinx.ext.autodoc',
    'sphinx.ext.autosummary',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
    'matplotlib.sphinxext.plot_directive',
    'myst_nb',
    'sphinx_copybutton',
]
exclude_patterns = ['_build']
templates_path = ['templates']
html_theme = 'furo'
html_title = f'{project} {version}'
html_static_path = ['style.css']
html_css_files = ['style.css']
html_copy_source = False
html_show_copyright = False
html_math_renderer = 'mathml'  # browsers draw it; nothing is loaded from elsewhere

nb_execution_mode = 'force'
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

# The prompts are not copied, nor what is printed.
copybutton_prompt_text = r'>>> |\.\.\. |\$ '
copybutton_prompt_is_regexp = True
copybutton_selector = 'div:not([class*=output]) > div.highlight > pre'

autodoc_member_order = 'bysource'
autodoc_inherit_docstrings = False  # Chainer's pages have Chainer's methods
toc_object_entries_show_parents = 'hide'
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


def move_pictures(app, path, parent_docname, content):
    """Makes the pictures of an included page relative to the page that includes it."""
    # Older Sphinx calls this for what the plots insert, too.
    if pathlib.PurePath(path).suffix == '.rst':
        page = pathlib.Path(app.srcdir, parent_docname).parent
        folder = os.path.relpath(pathlib.Path(app.srcdir, path).parent, page)
        picture = r'(\.\. (?:image|figure):: )(?!https?:)'
        content[0] = re.sub(picture, rf'\g<1>{folder}/', content[0])


def mathml(latex, as_block):
    """A formula as HTML knows it; several lines are aligned at their ``&``."""
    # Names of several letters are words, not products.
    latex = re.sub(r'(?<![\\{\w])[A-Za-z]{3,}', r'\\mathrm{\g<0>}', latex)
    tree = ElementTree.fromstring(latex2mathml.tex2mathml(latex, as_block))
    # Docutils sets the index of a letter with a dot below the letter.
    for element in tree.findall('.//{*}munderover'):
        base, index, dot = element
        if dot.text == '\u02d9':
            element[:] = [ElementTree.Element(MATHML + 'mover', accent='true'), index]
            element[0][:] = [base, dot]
            element.tag = MATHML + 'msub'
    return ElementTree.tostring(tree, 'unicode')


def visit_math(translator, node):
    translator.body.append(mathml(node.astext(), False))
    raise nodes.SkipNode


def visit_math_block(translator, node):
    text = mathml(node.astext(), True)
    translator.body.append(f'<div class="math">{text}</div>\n')
    raise nodes.SkipNode


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
    app.add_html_math_renderer('mathml', (visit_math, None), (visit_math_block, None))
    app.connect('include-read', move_pictures)
    app.connect('missing-reference', link_elsewhere)
    app.connect('env-check-consistency', check_reference)
