"""Builds the extension ``fusedopt._C``: compilers, ninja file, device images, report.

Neither torch nor setuptools is imported here; setup.py and the PEP 517 backend are thin callers.
"""
