"""Program: operators on the emulator of a GPU, against float64, as JSON."""

import json, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from test_triton import assert_as_good_as_plain
from operators import arguments, converted
from ptx.emulation import Emulation, emulated

name, size, precision = sys.argv[1], tuple(map(int, sys.argv[2].split(","))), sys.argv[3]
dtype = {"float32": torch.float32, "tf32": torch.float32}.get(precision) or getattr(torch, precision)
torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
torch.set_num_threads(1)
t = time.time()
with emulated(Emulation()) as e:
    args = arguments(name, *size)
    if dtype != torch.float32:
        args = converted(converted(args, dtype), torch.float64)
    try:
        assert_as_good_as_plain(name, args, dtype)
    except AssertionError as x:
        print("WRONG", x)
for l in e.lines: print(l)
print(name, size, precision, list(e.findings), round(time.time() - t, 1), "s")
