"""Machine code: what is read from it, faults in listings that are wrong on purpose, and every kernel's real code."""

from __future__ import annotations

import json

import numpy as np
import pytest
from trgnet.kernels import operator_table

from bench import sass, sass_run
from tests.test_compiled import output_of

OPERATORS = [name for name, backends in operator_table() if "triton" in backends]

LOOP = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
        /*0020*/                   ULDC UR4, c[0x0][0x218] ;
        /*0030*/                   ULDC.64 UR6, c[0x0][0x210] ;
        /*0040*/                   MOV R5, RZ ;
        /*0050*/                   IMAD.WIDE.U32 R2, R0, 0x4, RZ ;
        /*0060*/                   IADD3 R2, P0, R2, UR6, RZ ;
        /*0070*/                   IADD3.X R3, R3, UR7, RZ, P0, !PT ;
        /*0080*/                   UMOV UR5, 0x400 ;
.L_x_0:
        /*0090*/                   LDG.E R4, desc[UR8][R2.64] ;
        /*00a0*/                   LEA R6, R0, UR5, STRIDE ;
        /*00b0*/                   STS [R6], R4 ;
        /*00c0*/                   IADD3 R5, R5, 0x1, RZ ;
        /*00d0*/                   ISETP.GE.AND P0, PT, R5, UR4, PT ;
        /*00e0*/              @!P0 BRA `(.L_x_0) ;
        /*00f0*/                   EXIT ;
.L_x_1:
        /*0100*/                   BRA `(.L_x_1);
"""


def loop(stride: str = "0x2", shared: int = 4096) -> sass.Code:
    """Copies 32 numbers to shared memory as often as its second parameter says."""
    return sass.parse(LOOP.replace("STRIDE", stride), shared=shared)


def run(code: sass.Code, times: int = 5, size: int = 128) -> sass_run.Trace:
    return sass_run.run(code, (3,), 1, [(8, sass_run.Buffer("x_ptr", size)), (4, times)])


def test_instructions_blocks_and_loops_are_read():
    code = loop()
    load = code.instructions[9]
    assert (load.opcode, load.width, load.results, load.guard) == ("LDG", 4, ("R4",), None)
    assert set(load.sources) == {"UR8", "R2", "R3"}
    assert code.instructions[6].results == ("R2", "P0")
    assert code.instructions[14].guard == "!P0" and code.instructions[14].target == ".L_x_0"
    assert len(code.loops) == 1
    (head,) = code.loops
    assert code.instructions[code.blocks[head].start].opcode == "LDG"


@pytest.mark.parametrize(
    "line, results, sources",
    [
        (
            "HGMMA.64x32x8.F32.TF32 R56, R24, gdesc[UR44], R56",
            16,
            {"R24", "R27", "UR44", "UR45", "R56", "R71"},
        ),
        ("HMMA.1688.F32.TF32 R92, R80, R84, RZ", 4, {"R80", "R84"}),
        ("STS.128 [R68+UR5+0x800], R80", 0, {"R68", "UR5", "R80", "R83"}),
        ("LDSM.16.M88.4 R24, [R119+UR5+0x4000]", 4, {"R119", "UR5"}),
        ("@!P3 LDG.E.128 R24, desc[UR8][R4.64]", 4, {"P3", "UR8", "R4", "R5"}),
        ("IMAD.WIDE R2, R3, R125, R8", 2, {"R3", "R125", "R8", "R9"}),
    ],
)
def test_registers_of_wide_instructions(line: str, results: int, sources: set[str]):
    (one,) = sass.parse(f"        /*0000*/                   {line} ;").instructions
    assert len(one.results) == results
    assert sources <= set(one.sources)


@pytest.mark.parametrize(
    "line, fault",
    [
        ("HGMMA.64x8x8.F32.TF32 R24, R76, gdesc[UR44], RZ, !UPT", "eight columns"),
        ("STL.64 [R1+0x8], R4", "local memory"),
        ("LDL R4, [R1]", "local memory"),
        ("LDS.128 R4, [0x1400]", "accesses shared memory at 4096 to 4112 of 4096 bytes"),
        ("STS [0x10], R4", "accesses shared memory at -1008"),
    ],
)
def test_code_that_is_wrong_on_purpose(line: str, fault: str):
    code = sass.parse(f"        /*0120*/                   {line} ;", shared=4096)
    (found,) = sass.faults(code)
    assert fault in found and "0x0120" in found


@pytest.mark.parametrize(
    "line",
    [
        "HGMMA.64x16x8.F32.TF32 R24, R76, gdesc[UR44], RZ",
        "LDS.128 R4, [0x13f0]",
        "LDS RZ, [RZ]",
        "STS [R2], R4",
    ],
)
def test_code_that_is_right(line: str):
    assert sass.faults(sass.parse(f"        /*0000*/                   {line} ;", shared=4096)) == []


def test_spills_are_faults():
    assert "spills 16 bytes" in sass.faults(sass.parse(LOOP, stack=16))[0]


def test_what_is_no_listing_is_an_error():
    with pytest.raises(ValueError, match="nvdisasm"):
        sass.parse("nothing")


@pytest.mark.parametrize("times", [1, 5])
def test_loops_run_as_often_as_the_arguments_say(times: int):
    code = loop()
    trace = run(code, times)
    assert trace.faults == [] and trace.blocks == 3
    assert trace.executed[9] == 3 * times and trace.executed[0] == 3
    assert len(trace.path) == 9 + 6 * times + 1
    assert trace.accesses[9].sectors == 3 * times * 4 and trace.accesses[9].first == 3 * 4
    assert trace.touched == {("x_ptr", "load"): 4.0}


@pytest.mark.parametrize("stride, cycles", [("0x2", 1), ("0x3", 2), ("0x5", 8), ("0x7", 32)])
def test_bank_conflicts_are_counted(stride: str, cycles: int):
    assert run(loop(stride)).accesses[11].cycles == 3 * 5 * cycles


def test_wide_accesses_take_a_cycle_for_each_quarter_of_a_warp():
    lanes = np.arange(32)
    assert sass_run.bank_cycles(16 * lanes, lanes >= 0, 16) == 4
    assert sass_run.bank_cycles(128 * lanes, lanes >= 0, 16) == 32
    assert sass_run.bank_cycles(0 * lanes, lanes >= 0, 4) == 1
    assert sass_run.bank_cycles(4 * lanes, lanes < 7, 4) == 1


def test_accesses_beyond_the_memory_are_faults():
    assert "x_ptr of 124 bytes" in run(loop(), size=124).faults[0]
    assert "shared memory at 0 to 128 of 64 bytes" in run(loop(shared=64)).faults[0]


def test_an_unknown_address_is_an_error_that_says_what_to_give():
    code = sass.parse(LOOP.replace("LEA R6, R0, UR5, STRIDE", "IADD3 R6, R4, UR5, RZ"), shared=4096)
    with pytest.raises(sass_run.UnknownValue, match="0x00b0|0xb0.*contents of the tensor"):
        run(code)


def test_paths_of_a_branch_keep_registers_of_their_own():
    """One block loads what the others compute: neither may hide the other's value."""
    code = sass.parse(
        """
        /*0000*/                   S2R R0, SR_CTAID.X ;
        /*0010*/                   ULDC.64 UR6, c[0x0][0x210] ;
        /*0020*/                   MOV R6, UR6 ;
        /*0030*/                   MOV R7, UR7 ;
        /*0040*/                   IMAD.SHL.U32 R2, R0, 0x4, RZ ;
        /*0050*/                   ISETP.NE.AND P0, PT, R0, RZ, PT ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
        /*0070*/                   LDG.E R2, desc[UR8][R6.64] ;
        /*0080*/                   EXIT ;
.L_x_0:
        /*0090*/                   IMAD.WIDE.U32 R4, R2, 0x8, R6 ;
        /*00a0*/                   STG.E desc[UR8][R4.64], R2 ;
        /*00b0*/                   EXIT ;
"""
    )
    trace = run(code)
    assert trace.faults == [] and trace.executed[7] == 1 and trace.executed[10] == 2
    assert trace.touched == {("x_ptr", "load"): 1 / 3, ("x_ptr", "store"): 2 / 3}


def test_branches_by_a_table_go_where_it_says():
    code = sass.parse(
        """
        /*0000*/                   S2R R0, SR_CTAID.X ;
        /*0010*/                   IMAD.SHL.U32 R6, R0, 0x4, RZ ;
        /*0020*/                   LDC R4, c[0x2][R6] ;
        /*0030*/                   BRX R4 -0x40 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*);
.L_x_1:
        /*0040*/                   NOP ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   EXIT ;
""",
        tables=b"".join(n.to_bytes(4, "little") for n in (0x60, 0x40, 0x60)),
    )
    assert list(run(code).executed) == [3, 3, 3, 3, 1, 1, 2]
    assert code.blocks[0].successors == [1, 2]


@pytest.mark.parametrize("place", ["c[0x0][0x218]", "c[0x0][R5+0x218]", "c[0x0][R5+0x210]"])
def test_parameters_are_read_at_places_that_registers_say(place: str):
    index = "0x8" if place.endswith("0x210]") else "RZ"
    text = LOOP.replace("ULDC UR4, c[0x0][0x218]", f"LDC R9, {place}").replace("R5, UR4, PT", "R5, R9, PT")
    text = text.replace(
        "S2R R0, SR_TID.X", f"S2R R0, SR_TID.X ;\n        /*0018*/                   MOV R5, {index}"
    )
    trace = run(sass.parse(text.replace("STRIDE", "0x2"), shared=4096))
    assert trace.executed[10] == 3 * 5


def test_a_loop_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sass_run, "MOST_STEPS", 1000)
    with pytest.raises(sass_run.UnknownValue, match="no end after"):
        run(loop(), times=2**30)


CHECK = """
import json, sys
from bench import compiled, sass
found = {}
for precision in sys.argv[2:]:
    job = compiled.Job(sys.argv[1], precision, "sm_90")
    for launch in compiled.launches(job):
        built = compiled.compile_launch(launch, compiled.ARCHITECTURES["sm_90"])
        code = sass.read(built.asm["cubin"], built.metadata.shared)
        found[f"{launch.kernel.__name__} {precision}"] = [len(code.instructions), sass.faults(code)]
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "name", [n if n == "fusion_layer" else pytest.param(n, marks=pytest.mark.exhaustive) for n in OPERATORS]
)
def test_the_code_of_every_kernel_is_without_fault(name: str):
    pytest.importorskip("triton")
    precisions = ["float32"] if name == "fusion_layer" else ["float32", "tf32", "bfloat16"]
    found = json.loads(output_of("-c", CHECK, name, *precisions))
    assert found
    for kernel, (instructions, faults) in found.items():
        assert instructions > 20 and faults == [], kernel
