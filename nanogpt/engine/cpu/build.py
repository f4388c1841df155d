"""Build the C++ kernels, once at set-up:  python -m nanogpt.engine.cpu.build

Prints one line: where the library is, or why there is none. Without a compiler the engine runs on
plain torch, so that is no error. Nothing is ever compiled while serving.
"""

import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from nanogpt.engine.cpu.library import SOURCES, library_path

# Exact arithmetic in the order that is written, whatever the compiler; vectors of this machine.
FLAGS = ["-O3", "-march=native", "-std=c++20", "-ffp-contract=off", "-fno-math-errno"]


def build() -> Path:
    """Compile for this machine unless that was done; RuntimeError has the compiler's words."""
    target = library_path()
    if target.exists():
        return target
    from torch.utils import cpp_extension

    target.parent.mkdir(exist_ok=True)
    # ninja is installed beside this Python, which may not be on the path.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # OpenMP's pragmas without its library: the symbols are those that torch has loaded.
        cpp_extension.load(
            name=target.stem,
            sources=[str(path) for path in SOURCES if path.suffix == ".cpp"],
            extra_cflags=[*FLAGS, "-fopenmp"],
            build_directory=folder,
            is_python_module=False,
        )
        os.replace(next(Path(folder).glob("*.so")), target)
    return target


def main() -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not library_path().exists() and shutil.which(compiler) is None:
        print(f"CPU kernels: not built, there is no {compiler}; plain torch will do, more slowly")
        return
    try:
        print(f"CPU kernels: {build().name} is ready")
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        print("CPU kernels: not built, see above; plain torch will do, more slowly")


if __name__ == "__main__":
    main()
