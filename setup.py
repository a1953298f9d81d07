"""The text for an index page; all other metadata is in pyproject.toml."""

import pathlib
import re

from setuptools import setup

readme = pathlib.Path(__file__).with_name('README.rst').read_text(encoding='utf-8')
# An index has no pictures; what they show stands there instead.
picture = re.compile(r'\.\. image:: \S+\n +:alt: (.+\n(?: {6,}.+\n)*)')
setup(
    long_description=picture.sub(
        lambda match: f'*Picture:* {" ".join(match[1].split())}\n', readme
    ),
    long_description_content_type='text/x-rst',
)
