# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""python -m kernels [op] [--compile] [--json FILE] [--show FILE]

On a GPU: each kernel against its reference in fp64, and only if that passes the benchmark.
Without one, or with --compile: what the compiler makes of each kernel for sm_80, sm_90, sm_100 and gfx942.
--show: the kernels of a saved benchmark beside the other ways; kernels/h200.json is one.
"""
import argparse
import concurrent.futures
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile

import torch

if __name__ == "__main__":                                   # before triton is imported
    os.environ.pop("TRITON_INTERPRET", None)                 # an interpreting process cannot compile
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")   # the default changes between releases

from kernels import cast
from kernels._common import HAS_TRITON, assert_kernel, triton

OPS = ("masked_focal_ce", "decode_scores", "kron_quant", "int4_gemm", "score_conv", "moebius", "masked_blend",
       "cross_entropy", "fused_adamw", "token_logp", "cosine_max", "hard_assign", "greedy_match",
       "simgraph")
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a program
# of the row-wise operations, (R, V, dtype); the others bring CHECK_SHAPES and BENCH_SHAPES of their own
CHECK_SHAPES = [(257, 31, torch.float32), (64, 50257, torch.float16), (32, 151936, torch.bfloat16)]
BENCH_SHAPES = [(8192, 31, torch.float32), (4096, 50257, torch.bfloat16), (2048, 151936, torch.bfloat16)]


def table(rows):
    """Print dicts with equal keys as aligned columns."""
    cells = [list(rows[0])] + [["-" if v is None else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def by(numbers):
    """(24, 24, 1) as 24x24x1."""
    return "x".join(map(str, numbers))


# ------------------------------------------------------------------ without a GPU: the compile report
def cuobjdump(flag, cubin):
    """What the tool says about the code, or None where the wheel does not bring it."""
    tool = triton.knobs.nvidia.cuobjdump.path
    if not os.path.exists(tool):
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.check_output([tool, flag, file.name], text=True, stderr=subprocess.DEVNULL)


def nvidia_usage(cubin):
    """(registers a thread, spilled bytes a thread), or (None, None) where the tool is missing."""
    text = cuobjdump("-res-usage", cubin)
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text or "")}
    return (usage["REG"], usage["STACK"] + usage["LOCAL"]) if usage else (None, None)


def undefined_registers(sass):
    """Uniform registers that the code reads and never wrote before, top to bottom: there must be none. ptxas 12.8 makes
    such code where the second operand of a `wgmma` lies in the dead buffer of another one's first operand."""
    written, undefined = set(), set()
    for name, operands in re.findall(r"/\*[\da-f]{4,}\*/ +(?:@!?U?PT?\d* +)?([A-Z][\w.]*) *([^;]*);", sass):
        target = re.match(r"UR(\d+)\b", operands)  # the first operand, unless it is an address in brackets
        reads = [int(n) for n in re.findall(r"(?<!gdesc\[)\bUR(\d+)", operands[target.end():] if target else operands)]
        for n in re.findall(r"gdesc\[UR(\d+)", operands):   # four registers; those of an operand in registers are free
            reads += range(int(n) + 2 * bool(re.match(r"R\d+, R\d+, gdesc", operands)), int(n) + 4)
        undefined |= set(reads) - written
        if target:
            count = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
            written |= set(range(int(target[1]), int(target[1]) + count))
    return undefined


def amd_usage(assembly):
    """(vector registers a thread, spilled registers), from the metadata at the end of the assembly."""
    usage = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", assembly)}
    return usage["vgpr_count"], usage["vgpr_spill_count"] + usage["sgpr_spill_count"]


def compile_case(case, arch):
    """Compile one AOT case for one architecture and read off what can be known without running it.
    case[arch], where a case has it, holds what differs there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    case = case | case.get(arch, {})
    names = case["kernel"].arg_names
    source = ASTSource(fn=case["kernel"], constexprs=case["constexprs"],
                       signature={name: case["signature"].get(name, "constexpr") for name in names},
                       attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case["aligned"]})
    built = triton.compile(source, target=GPUTarget(*TARGETS[arch]), options=case["options"])
    nvidia = TARGETS[arch][0] == "cuda"
    assembly = built.asm["ptx" if nvidia else "amdgcn"]
    sass = cuobjdump("-sass", built.asm["cubin"]) if arch in ("sm_80", "sm_90") else None
    registers, spills = nvidia_usage(built.asm["cubin"]) if nvidia else amd_usage(assembly)
    offsets = re.findall(r"tt\.addptr .*, (?:tensor<[\dx]*)?(i\d+)>? loc", built.asm["ttir"])
    return {"registers": registers, "spills": spills, "shared": built.metadata.shared,
            "undefined": len(undefined_registers(sass)) if sass else None,
            "mma": len(re.findall(r"\b(?:mma\.sync|wgmma|tcgen05|v_mfma)", assembly)),
            "offsets": "+".join(sorted(set(offsets)))}


def compile_row(job):
    """One row of the compile report."""
    op, index, arch = job
    module = importlib.import_module(f"kernels.{op}")
    case = module.AOT_CASES[index]
    n_bytes, flops = module.floor(1, *case["size"], {"fp64": 8, "fp32": 4}.get(case["dtype"], 2))[case["mode"]]
    return {"op": op, "mode": case["mode"], "dtype": case["dtype"], "size": by(case["size"]), "arch": arch,
            **compile_case(case, arch), "floor B": n_bytes, "floor FLOP": flops}


def compile_report(ops):
    """One row per op, mode, case and architecture; the floor is of a call with 1 as its first size."""
    modules = {op: importlib.import_module(f"kernels.{op}") for op in ops}
    jobs = [(op, i, arch) for op, module in modules.items() for i in range(len(module.AOT_CASES)) for arch in TARGETS]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as processes:
        return list(processes.map(compile_row, jobs))


# ------------------------------------------------------------------ with a GPU: check, then benchmark
def check_op(module, device, shapes):
    """AssertionError unless kernel outputs and gradients meet the error rule (checked() says which) everywhere."""
    rule = getattr(module, "rule", assert_kernel)
    for *shape, dtype in shapes:
        args = module.example(*shape, dtype, device)
        out = module.outputs(module.kernel, args)
        eager = module.outputs(module.reference, args)
        ref64 = module.outputs(module.reference, cast(args, torch.float64))
        for name in out:
            rule(f"{name} {by(shape)} {dtype}", out[name], ref64[name], eager[name], sum(shape))


def time_gpu(fn, grad_to_none=None):
    """Median, 20th and 80th percentile in ms, L2 flushed between runs."""
    quantiles = [0.5, 0.2, 0.8]
    return triton.testing.do_bench(fn, warmup=25, rep=100, quantiles=quantiles, grad_to_none=grad_to_none)


def time_graph(fn):
    """Median ms inside a CUDA graph: no launch cost but a warm L2, so it bounds short kernels from below."""
    return triton.testing.do_bench_cudagraph(fn, quantiles=[0.5])


def peak_memory(fn):
    """Bytes that one call allocates at its peak."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    return torch.cuda.max_memory_allocated() - before


def measured_peaks():
    """Bytes/s of a 1 GiB copy; FLOP/s of matmuls in fp32 (without tf32), bf16 and int8: the denominators."""
    source = torch.empty(2 ** 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda")
    b, c = a.bfloat16(), a.to(torch.int8)
    torch.backends.cuda.matmul.allow_tf32 = False
    matmuls = {"fp32": lambda: a @ a.T, "bf16": lambda: b @ b.T, "int8": lambda: torch._int_mm(c, c.T)}
    flops = {name: 2e3 * 8192 ** 3 / time_gpu(fn)[0] for name, fn in matmuls.items()}
    return {"copy": 2e3 * 2 ** 30 / time_gpu(lambda: target.copy_(source))[0], **flops}


def measure(fn, mode, grad, work, peaks):
    """Time and memory of one thunk. work: the floor's (bytes, FLOPs), which all rates count; peaks: of both."""
    fn()                                                     # compiles outside the timed region
    memory = peak_memory(fn)
    ms, low, high = time_gpu(fn, grad_to_none=[grad])
    floor_ms = 1e3 * max(work[0] / peaks[0], work[1] / peaks[1])
    short = ms < 0.05 and mode == "forward"
    return {"ms": f"{ms:.4f}", "p20-p80": f"{low:.4f}-{high:.4f}",
            "graph ms": f"{time_graph(fn):.4f}" if short else None,
            "GB/s": f"{work[0] / ms / 1e6:.0f}", "% of copy": f"{1e5 * work[0] / ms / peaks[0]:.0f}",
            "TFLOP/s": f"{work[1] / ms / 1e9:.2f}", "% of matmul": f"{1e5 * work[1] / ms / peaks[1]:.1f}",
            "floor ms": f"{floor_ms:.4f}", "x floor": f"{ms / floor_ms:.2f}",
            "peak MB": f"{memory / 1e6:.0f}"}


def bench_op(op, device, shapes, peaks):
    """One row per shape, mode and provider (kernel, eager, torch.compile, ...)."""
    module, rows = importlib.import_module(f"kernels.{op}"), []
    for *shape, dtype in shapes:
        args = module.example(*shape, dtype, device)
        floors = module.floor(*shape, dtype.itemsize)
        size = {"size": by(shape), "dtype": str(dtype).removeprefix("torch.")}
        for mode, providers in module.bench(args).items():
            for provider, fn in providers.items():
                cost = measure(fn, mode, args[0], floors[mode], peaks)
                rows.append({"op": op, "mode": mode, "provider": provider, **size, **cost})
    return rows


def gpu_report(ops):
    """Check every op first: a kernel that is wrong is not timed."""
    import torch._functorch.config as compiled
    compiled.donated_buffer = False                          # else a compiled graph allows one backward only
    modules, rows = {op: importlib.import_module(f"kernels.{op}") for op in ops}, []
    for op, module in modules.items():
        check_op(module, "cuda", getattr(module, "CHECK_SHAPES", CHECK_SHAPES))
        print(f"{op}: agrees with its fp64 reference")
    peaks = measured_peaks()
    print("measured peaks, TB/s or TFLOP/s: " + ", ".join(f"{k} {v / 1e12:.1f}" for k, v in peaks.items()))
    for op, module in modules.items():
        shapes, unit = getattr(module, "BENCH_SHAPES", BENCH_SHAPES), getattr(module, "MATMUL", "fp32")
        rows += bench_op(op, "cuda", shapes, (peaks["copy"], peaks[unit]))
    return rows


def summary(rows):
    """A benchmark's rows of the kernels: share of the floor's speed, times faster than the others, peak memory."""
    found = []
    for key, group in itertools.groupby(rows, key=lambda row: [row[k] for k in ("op", "mode", "size", "dtype")]):
        group = {row["provider"]: row for row in group}
        kernel = group.pop("kernel")
        faster = {name: f"{float(row['ms']) / float(kernel['ms']):.2f} x" for name, row in group.items()}
        others = ", ".join(f"{name} {faster[name]}" for name in faster if name not in ("eager", "torch.compile"))
        found.append(dict(zip(("op", "mode", "size", "dtype"), key)) | {
            "ms": kernel["ms"], "of floor": f"{100 / float(kernel['x floor']):.0f} %",
            "eager": faster["eager"], "torch.compile": faster.get("torch.compile"),
            "MB": kernel["peak MB"], "eager MB": group["eager"]["peak MB"], "others": others})
    return found


# ------------------------------------------------------------------ main
def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="?", choices=OPS, help="one operation instead of all")
    parser.add_argument("--compile", action="store_true", help="the compile report, on a GPU as well")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--show", metavar="FILE", help="print a benchmark that --json saved")
    args = parser.parse_args(argv)
    if args.show:
        with open(args.show) as file:
            saved = json.load(file)
        print(f"{saved['device']}; torch {saved['torch']}, triton {saved['triton']}")
        return table(summary(row for row in saved["rows"] if args.op in (None, row["op"])))
    if not HAS_TRITON:
        sys.exit("error: this needs the triton package (Linux): pip install triton==3.7.1")
    on_gpu = torch.cuda.is_available() and not args.compile
    device = torch.cuda.get_device_name() if on_gpu else "compile report, nothing was run"
    print(f"{device}; torch {torch.__version__}, triton {triton.__version__}")
    rows = (gpu_report if on_gpu else compile_report)((args.op,) if args.op else OPS)
    table(rows)
    if args.json:
        with open(args.json, "w") as file:
            head = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
            json.dump(head | {"rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
