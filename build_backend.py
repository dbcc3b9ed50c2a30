"""setuptools, plus one question: does the environment that we are installed into already have a usable torch?

If it has, its headers are used and build isolation fetches nothing. If not, torch joins the build requirements,
so that a bare machine still gets the compiled operations.
"""

import sysconfig
from importlib.metadata import distributions

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  the hooks that need no change


def _missing_torch() -> list[str]:
    found = [d.version for d in distributions(path=[sysconfig.get_paths()["purelib"]]) if d.name == "torch"]
    usable = any(tuple(int(part) for part in version.split(".")[:2]) >= (2, 10) for version in found)
    return [] if usable else ["torch>=2.10"]


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + _missing_torch()


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + _missing_torch()
