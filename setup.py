"""Maps the three source folders onto one installed package; everything else is in pyproject.toml.

trgnet/      -> trgnet
kernels/     -> trgnet.kernels
optimizers/  -> trgnet.optimizers
"""

from setuptools import find_packages, setup

FOLDERS = {"trgnet": "trgnet", "trgnet.kernels": "kernels", "trgnet.optimizers": "optimizers"}

setup(
    package_dir=FOLDERS,
    packages=[
        package
        for name, folder in FOLDERS.items()
        for package in (name, *(f"{name}.{sub}" for sub in find_packages(folder)))
    ],
)
