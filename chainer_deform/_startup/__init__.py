"""What Python runs at its start, in processes that a patched program starts.

This folder is put into PYTHONPATH, so every file in it is importable by its bare name.
"""
