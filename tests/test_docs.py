"""Every example of the documentation runs, and what it names is there."""

import dataclasses
import doctest
import functools
import importlib
import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import chainer
import numpy
import pytest

import chainer_deform
from tests.programs import WARNINGS

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = [ROOT / 'README.rst', *sorted(DOCS.glob('*.rst'))]
READMES = sorted(ROOT.glob('examples/*/README.rst'))
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


def public_names():
    """What __all__ lists anywhere; the reference has to have it, says docs/conf.py."""
    for module in (chainer_deform, *MODULES):
        for name in getattr(module, '__all__', ()):
            yield f'{module.__name__}.{name}'


@pytest.mark.parametrize('name', dict.fromkeys(public_names()))
def test_every_public_name_has_an_example(name):
    module, _, name = name.rpartition('.')
    item = getattr(importlib.import_module(module), name)
    # Nobody but the package makes records.
    if callable(item) and not dataclasses.is_dataclass(item):
        assert f'{item.__module__}.{item.__name__}' in EXAMPLES


def blocks(page, kind):
    """The blocks of a page that begin with ``.. kind``: argument, options, text."""
    lines = [*page.read_text(encoding='utf-8').splitlines(), 'end']
    result, argument, block = [], None, None
    for line in lines:
        if block is not None and line and not line.startswith(' '):
            options = {}
            while block and (option := re.match(r' +:([\w-]+): ?(.*)', block[0])):
                options[option[1]] = option[2]
                del block[0]
            text = '\n'.join(re.sub('^    ', '', line) for line in block)
            result.append((argument, options, text))
            block = None
        if start := re.fullmatch(rf'\.\. {kind}::(?: (\S+))?', line):
            argument, block = start[1], []
        elif block is not None:
            block.append(line)
    return result


def python_blocks(page):
    """The Python blocks of a page: file name (or None) and text."""
    return [
        (options.get('name'), text)
        for language, options, text in blocks(page, 'code-block')
        if language == 'python'
    ]


def run_python(tmp_path, name, text, *args):
    script = tmp_path / name
    script.write_text(text, encoding='utf-8')
    subprocess.run(
        [sys.executable, *WARNINGS, *args, script],
        cwd=tmp_path,
        env={**os.environ, 'MPLBACKEND': 'agg'},
        check=True,
        timeout=100,
    )


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        pytest.param(*block, id=f'{page.relative_to(ROOT)}-{i}')
        for page in (*PAGES, *READMES)
        for i, block in enumerate(python_blocks(page))
    ],
)
def test_page(name, text, tmp_path):
    """A block with a file name is an unmodified Chainer script, run by the package."""
    if 'import onnxruntime' in text:
        pytest.importorskip('onnxruntime', '1.25')  # the first to have DeformConv
    args = ('-m', 'chainer_deform') if name else ()
    run_python(tmp_path, name or 'example.py', text, *args)


@pytest.mark.parametrize(
    ('file', 'text'),
    [
        pytest.param(file, text, id=f'{page.stem}-{i}')
        for page in PAGES
        for i, (file, _, text) in enumerate(blocks(page, 'plot'))
    ],
)
def test_picture(file, text, tmp_path):
    """Under -W error, and that it draws something."""
    if file:
        text = (DOCS / file).read_text(encoding='utf-8')
    text += '\nassert plt.gcf().axes\n'
    run_python(tmp_path, 'picture.py', text)


def test_readme_has_examples():
    names = [name for name, _ in python_blocks(ROOT / 'README.rst')]
    assert any(names)
    assert None in names


def found(pattern):
    """All that a pattern finds in the pages, lines joined at a backslash; for ids."""
    matches = {}
    for page in (*PAGES, *READMES):
        text = page.read_text(encoding='utf-8').replace('\\\n', ' ')
        for match in re.finditer(pattern, text, re.M):
            matches[match[0].strip(' `')] = match.groups()
    assert matches, pattern
    return [pytest.param(*groups, id=id_) for id_, groups in matches.items()]


@pytest.mark.parametrize('target', found(r'(?:^ +|``|=\S+ )make ([\w-]+)'))
def test_make_target(target):
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    assert re.search(rf'^{target}:', makefile, re.M)


@pytest.mark.parametrize(
    'path',
    found(
        r'``((?:\.ci|benchmarks|chainer_deform|docs|examples|tests)/(?!_build)[^` ]+)``'
    ),
)
def test_path(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize('name', found(r'``([Tt]est_?[A-Z_a-z]+)``'))
def test_named_test(name):
    tests = (ROOT / 'tests').rglob('test_*.py')
    assert any(
        re.search(rf'(def|class) {name}\b', path.read_text(encoding='utf-8'))
        for path in tests
    )


@pytest.mark.parametrize('extras', found(r"'(?:\.|chainer-deform)\[([\w,-]+)\]'"))
def test_extras(extras):
    setup = (ROOT / 'setup.py').read_text(encoding='utf-8')
    for extra in extras.split(','):
        assert f"'{extra}': " in setup


@functools.cache
def help_of(script):
    if script.endswith('_mn.py'):
        pytest.importorskip('mpi4py')
    return subprocess.run(
        [sys.executable, ROOT / script, '--help'],
        capture_output=True,
        check=True,
        text=True,
        timeout=100,
    ).stdout


@pytest.mark.parametrize(
    ('script', 'options'), found(r'python ((?:examples|benchmarks)/\S+\.py)([^`\n]*)')
)
def test_options_of_a_script(script, options):
    for option in re.findall(r'--[\w-]+', options):
        assert re.search(rf'{option}\b', help_of(script))
