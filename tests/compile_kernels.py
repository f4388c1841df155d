"""Compiles the Triton kernels for GPUs that are not there; says what each takes, as JSON lines.

    python -m tests.compile_kernels 75 float16 64 80 bfloat16 128

Triton and ptxas need no GPU. To be run in a process of its own, without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanogpt.engine.cuda import kernels, triton_backend

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
OTHERS = {"tiles": "*i32", "positions": "*i64", "sequence_of": "*i32", "block_tables": "*i32",
          "slots": "*i64", "scale": "fp32"}  # fmt: skip
UNALIGNED = {"scale", "table_stride", "num_rows"}


def compiled(kernel: Any, dtype: torch.dtype, capability: int, **constants: Any) -> Any:
    """A kernel for a GPU of that compute capability, with the options that it is launched with,
    and for pointers and strides that are multiples of 16."""
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("part_"):
            signature[name] = "*fp32"
        elif name in ("q", "k", "v", "key", "value", "out"):
            signature[name] = "*" + TYPES[dtype]
        else:
            signature[name] = OTHERS.get(name, "i32")
        if name not in constants and name not in UNALIGNED:
            aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={**options, **triton_backend.FIXED})


def variants(dtype: torch.dtype, capability: int, head_size: int) -> Iterator[tuple[str, Any]]:
    """Name and kernel of everything that a model of 12 heads launches."""
    heads = {"HEADS": 12, "HEAD_SIZE": head_size}
    yield "store", compiled(kernels.store, dtype, capability, WIDTH=2048, num_warps=4, **heads)
    dim = triton_backend.padded(head_size)
    tensor_cores = capability >= 80 and dtype != torch.float32
    for tile in (triton_backend.SINGLE, triton_backend.FIXED_TILE, triton_backend.CHUNK):
        is_chunk = tile == triton_backend.CHUNK
        launch = triton_backend.launch_of(tile, dim, tensor_cores=tensor_cores)
        shape = {
            "TILE": tile,
            "DIM": dim,
            "SPLIT": 0 if is_chunk else triton_backend.SPLIT,
            "num_warps": launch.num_warps,
            **heads,
        }
        if not is_chunk:
            yield f"fold {tile}", compiled(kernels.fold_parts, dtype, capability, **shape)
        for parts in (False,) if is_chunk else (False, True):
            shape |= {"KEYS": launch.keys, "num_stages": launch.num_stages}
            attend = compiled(
                kernels.attend, dtype, capability, BLOCK_SIZE=16, PARTS=parts, **shape
            )
            yield f"attend {tile}{' parts' if parts else ''}", attend


def resources(binary: Any) -> dict[str, int]:
    """Registers and bytes of spills, from ptxas, and bytes of shared memory."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(binary.asm["ptx"])
        file.flush()
        arch = re.search(r"\.target (\w+)", binary.asm["ptx"]).group(1)
        command = [ptxas, "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "shared": binary.metadata.shared,
        "registers": int(re.search(r"(\d+) registers", report).group(1)),
        "spilled": int(re.search(r"(\d+) bytes spill stores", report).group(1)),
        "tensor_cores": binary.asm["ptx"].count("mma"),
    }


def main(arguments: list[str]) -> None:
    triples = zip(arguments[::3], arguments[1::3], arguments[2::3], strict=True)
    for capability, name, head_size in triples:
        for kernel, binary in variants(getattr(torch, name), int(capability), int(head_size)):
            row = {"capability": int(capability), "dtype": name, "head_size": int(head_size)}
            print(json.dumps(row | {"kernel": kernel} | resources(binary)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
