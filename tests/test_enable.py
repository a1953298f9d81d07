"""The order of imports does not matter in an environment that is enabled."""

import os
import pathlib
import re
import subprocess
import sys
import sysconfig

import pytest

from tests.programs import environment

#: Chainer first, as a formatter sorts it.
SORTED = """
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

assert F.resize_images(np.zeros((1, 1, 2, 2), 'f'), (3, 3)).shape == (1, 1, 3, 3)
assert L.DeformableConvolution2D.__module__.startswith('chainer.links')
import chainer_deform
assert chainer_deform.links.DeformableConvolution2D(1, 1, 3)
print('works')
"""


class Environment:
    """An environment that has what this one has, and is changed alone."""

    def __init__(self, folder):
        subprocess.run(
            [sys.executable, '-m', 'venv', '--without-pip', folder], check=True
        )
        self.python = folder / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
        (site,) = folder.rglob('site-packages')
        self.site = site
        root = pathlib.Path(__file__).parents[1]
        installed = sysconfig.get_path('purelib')
        (site / 'installed.pth').write_text(f'{installed}\n{root}\n')

    def run(self, *args, **more):
        variables = {**environment(), 'PYTHONNOUSERSITE': '1', **more}
        variables.pop('PYTHONPATH', None)
        return subprocess.run(
            [self.python, *args],
            capture_output=True,
            text=True,
            timeout=100,
            env=variables,
        )

    def change(self, order):
        result = self.run('-m', 'chainer_deform', order)
        assert (result.returncode, result.stderr) == (0, '')
        return result.stdout


@pytest.fixture(scope='module')
def env(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp('environment') / 'env')


def test_enable_and_disable(env):
    assert env.change('--status') == 'disabled\n'
    enabled = env.change('--enable')
    (path,) = re.findall(r'enabled: (.*\.pth)\n', enabled)
    assert pathlib.Path(path).parent == env.site
    assert env.change('--status') == enabled
    assert env.change('--enable') == enabled
    result = env.run('-c', SORTED)
    assert (result.returncode, result.stdout) == (0, 'works\n'), result.stderr
    assert env.change('--disable') == f'removed: {path}\n'
    assert not os.path.exists(path)
    assert env.change('--disable') == 'disabled\n'
    assert env.change('--status') == 'disabled\n'


def test_patched_programs_stay_patched(env):
    env.change('--enable')
    code = 'import chainer.links as L; print(L.DeformableConvolution2D.__module__)'
    (env.site / 'program.py').write_text(code)
    result = env.run('-m', 'chainer_deform', '-m', 'program')
    assert result.stdout == 'chainer_deform.links.deformable_convolution_2d\n'
    result = env.run('-c', code)
    assert result.stdout == 'chainer.links.connection.deformable_convolution_2d\n'
    env.change('--disable')


def test_programs_without_chainer_notice_nothing(env):
    code = 'import sys; print(sorted(sys.modules), sys.path)'
    before = eval(env.run('-c', code).stdout.replace('] [', '], ['))
    env.change('--enable')
    after = eval(env.run('-c', code).stdout.replace('] [', '], ['))
    assert after[1] == before[1]
    assert set(after[0]) - set(before[0]) <= {'chainer_deform_startup', 'sys', 'os'}
    env.change('--disable')


def test_a_package_that_is_gone_harms_nothing(env):
    env.change('--enable')
    (path,) = env.site.glob('chainer_deform*.pth')
    line = path.read_text()
    path.write_text(re.sub("f = '[^']*'", "f = '/nowhere'", line))
    assert 'of another version' in env.change('--status')
    result = env.run('-c', 'print(1)')
    assert (result.returncode, result.stdout, result.stderr) == (0, '1\n', '')
    env.change('--disable')


def test_a_folder_that_cannot_be_written(env):
    (env.site / 'chainer_deform_enable.pth').mkdir()
    result = env.run('-m', 'chainer_deform', '--enable')
    assert result.returncode == 1
    assert re.fullmatch(
        r'python -m chainer_deform --enable: .*there is a folder.*\n', result.stderr
    )
    (env.site / 'chainer_deform_enable.pth').rmdir()
