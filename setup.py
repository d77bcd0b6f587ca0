from setuptools import setup

# scikit-build-core's setuptools plugin runs CMake; everything else stands in pyproject.toml.
setup(cmake_source_dir=".")
