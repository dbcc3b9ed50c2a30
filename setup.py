"""Builds the four compiled libraries; whatever cannot be built is left out and said, never fatal.

_ops    the operator schemas (LibTorch stable ABI)          _cpu   CPU kernels (stable ABI)
_cuda   CUDA kernels (stable ABI)                           _host  input side: box sampling, pixels (pybind11, no torch)

Environment: SCRL_FAST_EXT=require makes a failed library an error, =0 builds none; SCRL_FAST_CUDA=0 leaves CUDA out;
CUDA_HOME, TORCH_CUDA_ARCH_LIST (default "8.0;9.0+PTX") and MAX_JOBS as everywhere with torch.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
HOME = "https://github.com/scrl-fast/scrl_fast"
os.chdir(ROOT)
try:
    import torch
except ImportError:  # build isolation hides the environment that we are installed into
    sys.path.append(sysconfig.get_paths()["purelib"])
    try:
        import torch
    except ImportError:
        torch = None

STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # one build serves torch 2.10 and newer
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
# nobody reads errno or floating-point traps here; loops with choices and conversions stay scalar while they count
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS += (
    [] if "-g" in os.environ.get("CFLAGS", "") else ["-g0"]
)  # Python's own flags ask for them: _host takes 13 MB with debug symbols, 0.7 without
missing: dict[str, str] = {}  # library -> why it was left out


def leave_out(libraries: tuple[str, ...], why: str) -> None:
    """Raises where SCRL_FAST_EXT=require wants all of them."""
    if os.environ.get("SCRL_FAST_EXT") == "require":
        raise SystemExit(f"scrl_fast: {', '.join(libraries)} cannot be built (SCRL_FAST_EXT=require): {why}")
    missing.update(dict.fromkeys(libraries, why))


def commit() -> str | None:
    """The commit of this checkout; None without git, and of a source distribution inside another repository."""
    try:
        asked = ["git", "rev-parse", "--show-toplevel", "--short", "HEAD"]
        said = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    top, *names = said.stdout.split("\n") if said.returncode == 0 else [""]
    return names[0] if top and Path(top).resolve() == ROOT.resolve() else None


def toolkit_root() -> str:
    """The CUDA toolkit with headers and libraries; '' when there is none. ``nvcc`` on PATH may be a wrapper script."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = shutil.which("nvcc")
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), CUDA_HOME]
    if nvcc:
        said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"TOP=(\S+)", said.stdout + said.stderr)
        guesses.append(top and os.path.realpath(top[1]))
    for guess in filter(None, guesses):
        root = Path(guess)
        if (root / "include/cuda_runtime.h").exists() and list(root.glob("lib*/libcudart*")):
            return str(root)
    return ""


def cuda_extension() -> Extension | None:
    sources = sorted(glob("csrc/cuda/*.cu"))
    if os.environ.get("SCRL_FAST_CUDA") == "0":
        missing["_cuda"] = "left out at build time by SCRL_FAST_CUDA=0"
    elif torch.version.cuda is None:
        missing["_cuda"] = f"torch {torch.__version__} was built without CUDA"
    elif not (root := toolkit_root()):
        missing["_cuda"] = "no CUDA toolkit at build time (nvcc, headers and libcudart; set CUDA_HOME)"
    else:
        from torch.utils import cpp_extension

        cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = root
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        flags = {
            "cxx": [*CXX_FLAGS, *STABLE_ABI, "-DUSE_CUDA"],
            "nvcc": ["-O3", "-std=c++20", *STABLE_ABI, "-DUSE_CUDA", "--expt-relaxed-constexpr", "-lineinfo"],
        }
        return cpp_extension.CUDAExtension(
            "scrl_fast._cuda", sources, include_dirs=[str(ROOT / "csrc")], extra_compile_args=flags, py_limited_api=True
        )
    return None


def extensions() -> list[Extension]:
    if os.environ.get("SCRL_FAST_EXT") == "0":
        missing.update(dict.fromkeys(("_ops", "_cpu", "_cuda", "_host"), "left out at build time by SCRL_FAST_EXT=0"))
        return []
    built = []
    try:
        import pybind11

        built.append(
            Extension(
                "scrl_fast._host",
                sorted(glob("csrc/host/*.cpp")),
                include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
                extra_compile_args=[*CXX_FLAGS, "-pthread"],
                extra_link_args=["-pthread"],
                language="c++",
            )
        )
    except ImportError:
        leave_out(("_host",), "pybind11 was absent at build time")
    if torch is None:
        leave_out(("_ops", "_cpu", "_cuda"), "torch was absent at build time")
        return built
    from torch.utils.cpp_extension import CppExtension

    for name, sources in (("_ops", ["csrc/ops.cpp"]), ("_cpu", sorted(glob("csrc/cpu/*.cpp")))):
        built.append(
            CppExtension(
                f"scrl_fast.{name}",
                sources,
                include_dirs=[str(ROOT / "csrc")],
                extra_compile_args=[*CXX_FLAGS, *STABLE_ABI],
                py_limited_api=True,
            )
        )
    cuda = cuda_extension()
    return built + ([cuda] if cuda else [])


class PlainBuild(build_ext):
    """``build_ext`` where torch is absent: same constructor options as torch's."""

    def build_extensions(self):
        super().build_extensions()


if torch is not None:
    from torch.utils.cpp_extension import BuildExtension

    BaseBuild = BuildExtension.with_options(no_python_abi_suffix=False)
else:
    BaseBuild = PlainBuild


class SafeBuild(BaseBuild):
    """One library that does not compile never takes another, or the installation, down."""

    def build_extensions(self):
        try:
            super().build_extensions()
        except Exception as error:  # no compiler at all: torch's own checks raise before the first library
            self._left_out("every library", error)
            missing.update({e.name.split(".")[-1]: self._why(error) for e in self.extensions if not self._exists(e)})
        self._write_build_info(Path(self.build_lib, "scrl_fast"))

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            self._left_out(ext.name, error)
            missing[ext.name.split(".")[-1]] = self._why(error)

    def _left_out(self, what: str, error: Exception) -> None:
        if os.environ.get("SCRL_FAST_EXT") == "require":
            raise error
        print(f"scrl_fast: {what} not built ({self._why(error)}); the package works without it", file=sys.stderr)

    @staticmethod
    def _why(error: Exception) -> str:
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None:
            return f"no C++ compiler at build time ({compiler} not found; install one or set CXX)"
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0] if text else 'no message'} (see the output of pip install -v)"

    def _exists(self, ext) -> bool:
        return Path(self.build_lib, self.get_ext_filename(ext.name)).exists()

    def _write_build_info(self, folder: Path) -> None:
        built = [e.name.split(".")[-1] for e in self._only_built()]
        info = {
            "built": built,
            "missing": missing,
            "torch": torch.__version__ if torch else None,
            "python": sys.version.split()[0],
            "arch_list": os.environ.get("TORCH_CUDA_ARCH_LIST") if "_cuda" in built else None,
            "commit": commit(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    def _only_built(self):
        """The extensions that exist, while setuptools asks for them."""
        return [e for e in self.extensions if self._exists(e)]

    def copy_extensions_to_source(self):
        every, self.extensions = self.extensions, self._only_built()
        super().copy_extensions_to_source()
        self.extensions = every
        self._write_build_info(Path("scrl_fast"))

    def get_outputs(self):
        every, self.extensions = self.extensions, self._only_built()
        try:
            return super().get_outputs()
        finally:
            self.extensions = every

    def get_output_mapping(self):
        every, self.extensions = self.extensions, self._only_built()
        try:
            return super().get_output_mapping()
        finally:
            self.extensions = every


def long_description() -> str:
    """The README with whole addresses in its links: on the package index there is no file beside it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files = HOME.replace("github.com", "raw.githubusercontent.com")
    shown = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{files}/main/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\1{HOME}/blob/main/", shown)


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": SafeBuild},
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
