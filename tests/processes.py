"""Runs programs that need torch in a Python that has it."""

import os
import pathlib
import subprocess

import pytest


def run_with_torch(module, *arguments) -> None:
    """Runs the file of a module; skips the test where there is no torchvision."""
    python = os.environ.get('TORCHVISION_PYTHON', '/usr/bin/python3')
    environment = {**os.environ}
    environment.pop('PYTHONPATH', None)
    script = pathlib.Path(module.__file__)
    command = [python, str(script), *map(str, arguments)]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=100
        )
    except OSError as error:
        pytest.skip(f'{python}: {error.strerror}')
    if process.returncode == module.MISSING:
        pytest.skip(f'{python}: {process.stderr.strip()}')
    assert process.returncode == 0, process.stderr
