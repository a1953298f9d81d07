"""Compiles kernels as CuPy would on a GPU, and disassembles them; needs no GPU."""

from __future__ import annotations

import functools
import io
import pathlib
import shutil
import subprocess
import tempfile
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # CuPy's about libraries that are not needed here
    cupy = pytest.importorskip('cupy', reason='make test-cuda-compile installs CuPy')
    nvidia = pytest.importorskip(
        'nvidia', reason='make test-cuda-compile installs NVRTC'
    )
    from cupy._core import _carray, _kernel, _scalar, core
    from cupy.cuda import compiler

ARCHITECTURES = ('sm_70', 'sm_75', 'sm_80', 'sm_90')

_ARRAY, _INDEXER, _SCALAR = 1, 2, 3  # CuPy's kinds of arguments


def compile_options() -> list[str]:
    includes = [core._get_header_dir_path()]
    for path in nvidia.__path__:
        includes += map(str, pathlib.Path(path).rglob('include'))
    return [
        '--std=c++17',
        *(f'-I{path}' for path in includes),
        *core._get_cccl_include_options(),
    ]


@functools.cache
def accepted_architectures() -> list[str]:
    """Those of ARCHITECTURES that this NVRTC still knows."""
    accepted = []
    for architecture in ARCHITECTURES:
        program = compiler._NVRTCProgram('', 'empty.cu', method='cubin')
        try:
            program.compile((f'-arch={architecture}',))
        except compiler.CompileException as error:
            if 'gpu-architecture' not in str(error):
                raise
        else:
            accepted.append(architecture)
    return accepted


@functools.cache
def compiled(source: str, architecture: str) -> tuple[bytes, str]:
    """The machine code of a kernel, and what the assembler says of it."""
    log = io.StringIO()
    program = compiler._NVRTCProgram(source, 'kernel.cu', method='cubin')
    options = *compile_options(), f'-arch={architecture}', '--ptxas-options=-v'
    cubin, _ = program.compile(options, log)
    return cubin + b'\0', log.getvalue()  # CuPy takes the last byte away


@functools.cache
def ptx(source: str, architecture: str) -> str:
    """The intermediate code of a kernel."""
    program = compiler._NVRTCProgram(source, 'kernel.cu')
    options = *compile_options(), f'-arch={architecture.replace("sm", "compute")}'
    return program.compile(options)[0].decode()


@functools.cache
def disassembled(cubin: bytes) -> str:
    """Machine code as text."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'kernel.cubin'
        path.write_bytes(cubin)
        return subprocess.run(
            [disassembler(), '-c', str(path)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout


@functools.cache
def disassembler() -> str:
    for path in nvidia.__path__:
        for program in pathlib.Path(path).rglob('nvdisasm*'):
            return str(program)
    return shutil.which('nvdisasm') or pytest.skip(
        'make test-cuda-compile installs nvdisasm'
    )


def generated_source(kernel, args, index_32_bits=True) -> str:
    """What CuPy would compile to run a kernel on these arrays and numbers."""
    infos, letters = [], {}
    for param, arg in zip(kernel.params, (*args, None)):
        if param.raw:
            infos.append(
                _kernel._ArgInfo(
                    _ARRAY, cupy.ndarray, arg.dtype, 1, True, index_32_bits
                )
            )
            if param.dtype is None:
                letters[param.ctype] = arg.dtype
        elif param.name == '_ind':
            infos.append(
                _kernel._ArgInfo(
                    _INDEXER, _carray.Indexer, None, 1, True, index_32_bits
                )
            )
        else:
            infos.append(
                _kernel._ArgInfo(
                    _SCALAR, _scalar.CScalar, param.dtype, 0, True, index_32_bits
                )
            )
    code = _kernel._get_elementwise_kernel_code(
        tuple(infos),
        _kernel._TypeMap(tuple(letters.items())),
        kernel.params,
        kernel.operation,
        kernel.name,
        kernel.preamble,
    )
    return ''.join(f'#include <{name}>\n' for name in core._cupy_header_list) + code
