"""Lets tools that expect a setup.py install the package; all metadata is in pyproject.toml."""

from setuptools import setup

setup()
