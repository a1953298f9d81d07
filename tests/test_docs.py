"""Every example of the documentation runs."""

import doctest
import importlib
import pathlib
import pkgutil
import re
import subprocess
import sys

import chainer
import numpy
import pytest

import chainer_deform

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.rst', *(ROOT / 'docs').glob('*.rst')]
MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(chainer_deform.__path__, 'chainer_deform.')
    if not module.name.endswith(('__main__', 'cpu_numba'))  # the latter may be missing
]
EXAMPLES = {
    test.name: test
    for module in MODULES
    for test in doctest.DocTestFinder(exclude_empty=True).find(
        module,
        extraglobs={'np': numpy, 'chainer': chainer, 'chainer_deform': chainer_deform},
    )
    if test.examples
}


@pytest.mark.parametrize('name', EXAMPLES)
def test_docstring(name):
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(EXAMPLES[name])
    assert result.attempted
    assert not result.failed


def test_every_public_name_has_an_example():
    public = [
        getattr(module, name)
        for module in (chainer_deform, chainer_deform.functions, chainer_deform.links)
        for name in module.__all__
    ]
    public.append(chainer_deform.optimizer_hooks.scale_updates)
    for item in public:
        if callable(item):
            assert f'{item.__module__}.{item.__name__}' in EXAMPLES, item


def python_blocks(page):
    """The Python blocks of a page: file name (or None) and text."""
    lines = [*page.read_text(encoding='utf-8').splitlines(), 'end']
    blocks, block = [], None
    for line in lines:
        if block is not None and line and not line.startswith(' '):
            text = '\n'.join(re.sub('^    ', '', line) for line in block)
            name = re.match(r'\s*:name: (\S+)\n', text)
            blocks.append((name and name[1], re.sub(r'^\s*:name:.*\n', '', text)))
            block = None
        if line == '.. code-block:: python':
            block = []
        elif block is not None:
            block.append(line)
    return blocks


@pytest.mark.parametrize(
    ('name', 'text'), [block for page in PAGES for block in python_blocks(page)]
)
def test_page(name, text, tmp_path):
    """A block with a file name is an unmodified Chainer script, run by the package."""
    script = tmp_path / (name or 'example.py')
    script.write_text(text, encoding='utf-8')
    subprocess.run(
        [
            sys.executable,
            '-W',
            'error',
            *(['-m', 'chainer_deform'] if name else []),
            str(script),
        ],
        cwd=tmp_path,
        check=True,
        timeout=100,
    )


def test_readme_has_examples():
    names = [name for name, _ in python_blocks(ROOT / 'README.rst')]
    assert any(names)
    assert None in names
