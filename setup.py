"""Package metadata; tool settings are in pyproject.toml."""

import pathlib
import runpy

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent
version = runpy.run_path(str(here / 'chainer_deform' / '_version.py'))['__version__']

fast = ['numba>=0.60']
plot = ['matplotlib>=3.7']
onnx = ['onnx>=1.14']
examples = ['scikit-learn>=1.1', 'scikit-image>=0.20', *plot]
test = [
    'pytest>=7',
    'pytest-xdist>=3',
    'hypothesis>=6.80',
    'h5py>=3.7',
    'onnxruntime>=1.16',
    'threadpoolctl>=3',
    *examples,
    *fast,
    *onnx,
]

setup(
    name='chainer-deform',
    version=version,
    description="Deformable convolution for Chainer, on today's Python and NumPy",
    long_description=(here / 'README.rst').read_text(encoding='utf-8'),
    long_description_content_type='text/x-rst',
    license='MIT',
    packages=find_packages(include=['chainer_deform', 'chainer_deform.*']),
    python_requires='>=3.9',
    install_requires=['chainer==7.8.1', 'numpy>=1.23', 'scipy>=1.8'],
    extras_require={
        # Compiles the CPU path for the CPU it runs on.
        'fast': fast,
        'cuda': ['cupy>=12,<15'],
        # What compiles and disassembles the kernels where there is no GPU.
        'cuda-compile': [
            'cupy-cuda13x==14.2.*',
            'nvidia-cuda-nvrtc==13.0.*',
            'nvidia-cuda-runtime==13.0.*',
            'nvidia-cuda-nvdisasm>=13.2,<14',
        ],
        # The peers that are compared with.
        'bench': ['onnxruntime', 'openvino', 'threadpoolctl>=3', *fast, *onnx, *plot],
        'plot': plot,
        'onnx': onnx,
        # It needs an MPI: that of the cluster, or the package mpich or openmpi.
        'mpi': ['mpi4py>=4'],
        'examples': examples,
        'docs': [
            'sphinx>=7.2.5',
            'docutils>=0.21',
            'furo',
            'sphinx-copybutton',
            'myst-nb>=1',
            'scikit-learn>=1.1',
            *plot,
        ],
        'test': test,
        'lint': ['ruff==0.17.6'],
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3 :: Only',
        'Programming Language :: Python :: 3.9',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
)
