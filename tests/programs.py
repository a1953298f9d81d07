"""How tests start programs."""

import sys

#: Options of Python with which a warning ends the program.
WARNINGS = ['-W', 'error']
if sys.version_info < (3, 10):  # its last Matplotlib uses old names of pyparsing
    WARNINGS += ['-W', 'ignore::DeprecationWarning']
