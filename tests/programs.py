"""How tests start programs, and how the example programs are looked at."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import textwrap

import numpy

ROOT = pathlib.Path(__file__).parents[1]

#: Options of Python with which a warning ends the program.
WARNINGS = ['-W', 'error']
if sys.version_info < (3, 10):  # its last Matplotlib uses old names of pyparsing
    WARNINGS += ['-W', 'ignore::DeprecationWarning']

#: Those for the examples. NumPy leaves a broken file open, which it should not.
EXAMPLE_WARNINGS = [*WARNINGS, '-W', 'ignore::ResourceWarning']


def environment(**more):
    """Returns the environment of an example; no installation of the package needed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    return {**os.environ, 'PYTHONPATH': path, **more}


def run_example(script, cwd, options, **more):
    """Runs a script with options that are separated by spaces."""
    return subprocess.run(
        [sys.executable, *EXAMPLE_WARNINGS, script, *options.split()],
        cwd=cwd,
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_python(*args, cwd, stdin='', **more):
    """Runs Python with options and arguments, with warnings as errors."""
    return subprocess.run(
        [sys.executable, '-W', 'error', *args],
        cwd=cwd,
        env=environment(**more),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )


def write(path, code):
    """Writes an indented program to a file in a folder that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(code))


def load_module(path):
    """Imports a module of an example under a name that no other example has."""
    name = f'{path.parent.name}_{path.stem}'
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expect_success(result):
    """Checks that a run complained about nothing."""
    assert (result.returncode, result.stderr) == (0, '')


def expect_error(result, message):
    """Checks that train.py ended with one line and exit status 2."""
    assert result.returncode == 2
    assert re.fullmatch(f'train.py: error: .*{message}.*\n', result.stderr)


def expect_picture(path, width, height):
    """Checks that a file is a whole PNG of a size."""
    picture = path.read_bytes()
    assert picture.startswith(b'\x89PNG\r\n\x1a\n')
    assert picture[12:24] == b'IHDR' + struct.pack('>II', width, height)
    assert picture.endswith(b'IEND\xaeB`\x82')


def read_log(path):
    """Returns a LogReport's entries, without the times."""
    log = json.loads(path.read_text())
    for entry in log:
        del entry['elapsed_time']
    return log


def expect_same_training(directory, expected, epoch):
    """Checks that two trainings of a deformable model ended with the same bits."""
    assert read_log(directory / 'log') == read_log(expected / 'log')
    name = f'snapshot_epoch_{epoch}.npz'
    with numpy.load(directory / name) as a, numpy.load(expected / name) as b:
        state, other = (
            {key for key in file if key.startswith('updater/')} for file in (a, b)
        )
        assert state == other
        assert any(key.endswith('offset_conv/W') for key in state)
        for key in state:
            numpy.testing.assert_array_equal(a[key], b[key], key)
