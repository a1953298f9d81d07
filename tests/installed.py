"""The first use of the installed package; `make dist` runs it outside the sources."""

import importlib.metadata
import pathlib
import subprocess
import sys

import chainer_deform  # isort: skip  (before chainer)
import chainer
import chainer.functions as F
import numpy as np

from chainer_deform.links import DeformableConvolution2D

#: As a formatter sorts it, which an enabled environment does not mind.
SORTED = 'import chainer, chainer_deform; print(chainer.__version__)'


def main():
    folder = pathlib.Path(chainer_deform.__file__).parent
    assert pathlib.Path(sys.prefix) in folder.parents, f'{folder} was not installed'
    assert (folder / 'py.typed').is_file()
    package = importlib.metadata.distribution('chainer-deform')
    assert package.version == chainer_deform.__version__
    assert any(path.name == 'LICENSE' for path in package.files)

    x = np.random.uniform(0, 1, (2, 3, 9, 7)).astype(np.float32)
    layer = DeformableConvolution2D(3, 4, 3, pad=1)
    optimizer = chainer.optimizers.Adam().setup(layer)
    losses = []
    for _ in range(20):
        loss = F.mean(layer(x) ** 2)
        losses.append(float(loss.array))
        optimizer.update(lambda: loss)  # noqa: B023  (called at once)
    assert losses[-1] < losses[0]
    loops = sys.modules['chainer_deform.sampling.compiler'].loops().__name__
    numba = [line for line in package.requires if line.startswith('numba')]
    assert numba

    run('-m', 'chainer_deform', '--enable')
    run('-c', SORTED)
    run('-m', 'chainer_deform', '--disable')
    print(f'chainer_deform {package.version} works here, by {loops}')


def run(*args):
    subprocess.run([sys.executable, '-W', 'error', *args], check=True, timeout=300)


if __name__ == '__main__':
    main()
