"""Hot paths of listings."""

from benchmarks.disassembly import AMDGCN, SASS, count, read_amdgcn, read_sass


def sass(*lines):
    """Count a listing in the format of nvdisasm; labels end in a colon."""
    printed = ["\t.section\t.text.kernel", ".text.kernel:"]
    for address, line in enumerate(lines):
        label = line.endswith(":") or line.lstrip().startswith("//##")
        printed.append(line if label else f"        /*{16 * address:04x}*/    {line} ;")
    return count(read_sass("\n".join(printed)), SASS)


def amd(*lines):
    """Count a listing in the format of LLVM."""
    return count(read_amdgcn("\n".join(lines)), AMDGCN)


LOOP = (
    "S2R R0, SR_CTAID.X",
    "@P0 BRA `(.L_x_2)",
    ".L_x_1:",
    "LDG.E.128 R4, desc[UR4][R2.64]",
    "LDG.E.64 R8, desc[UR4][R2.64]",
    "@P1 LDG.E.U16 R8, desc[UR4][R2.64]",
    "LDC.64 R2, c[0x0][0x210]",
    "STS [R5], R4",
    "LDS R4, [R5]",
    "MUFU.EX2 R4, R4",
    "F2I.TRUNC.NTZ R5, R4",
    "NOP",
    "STG.E desc[UR4][R2.64], R5",
    "@!P0 BRA `(.L_x_1)",
    ".L_x_2:",
    "EXIT",
    ".L_x_3:",
    "BRA `(.L_x_3)",
    "NOP",
)


def test_a_loop_is_counted_without_what_surrounds_it():
    found = sass(*LOOP)
    assert found.loops
    assert found.instructions == 10
    assert found.special == 1
    assert found.conversions == 1
    assert found.loads == {16: 1, 8: 1, 2: 1}
    assert found.stores == {4: 1}
    # The first two and EXIT; what nothing reaches is not part of the program.
    assert found.outside == 3


def test_a_subroutine_and_the_block_that_calls_it_are_left_out():
    found = sass(
        ".L_loop:",
        "FCHK P0, R1, R2",
        "@!P0 BRA `(.L_done)",
        "MOV R20, 0x100",
        "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_slowpath)",
        "MOV R1, R21",
        ".L_done:",
        "FADD R1, R1, R1",
        "@P1 BRA `(.L_loop)",
        "EXIT",
        "$__internal_0_$__cuda_sm20_div_slowpath:",
        "FMUL R1, R1, R2",
        "MUFU.RCP R1, R1",
        "RET.REL.NODEC R20 `(kernel)",
    )
    assert found.loops
    assert found.instructions == 4
    assert found.special == 0
    assert found.outside == 3 + 1 + 3


def test_a_call_that_never_returns_is_a_jump():
    found = sass(
        ".L_loop:",
        "FADD R1, R1, R1",
        "@P0 CALL.REL.NOINC `(.L_out)",
        "BRA `(.L_loop)",
        ".L_out:",
        "STG.E desc[UR4][R2.64], R5",
        "EXIT",
    )
    assert found.loops
    assert found.instructions == 3
    assert found.stores == {}
    assert found.outside == 2


def test_what_only_diverged_warps_take_is_left_out():
    found = sass(
        "FADD R1, R1, R1",
        "BRA.DIV UR4, `(.L_slow)",
        ".L_join:",
        "EXIT",
        ".L_slow:",
        "FMUL R1, R1, R1",
        "BRA `(.L_join)",
    )
    assert found.instructions == 3


# The compiler laid the loop out with its head at the end, as it likes to do.
ROTATED = (
    "kernel:                       ; @kernel",
    "\t.loc\t1 192 0 prologue_end            ; binning.py:192:0",
    "\ts_load_dwordx2 s[2:3], s[0:1], 0x0",
    "\ts_cbranch_scc1 .LBB0_11",
    "\ts_branch .LBB0_6",
    ".LBB0_5:                                ;   in Loop: Header=BB0_6 Depth=1",
    "\t.loc\t1 107 26 is_stmt 1              ; binning.py:107:26 @[ binning.py:204:38 ]",
    "\ts_waitcnt vmcnt(0)",
    "\tv_exp_f32_e32 v16, v16",
    "\tv_cvt_i32_f32_e32 v12, v12",
    "\tglobal_store_short v[2:3], v1, off",
    "\ts_nop 0",
    "\ts_cbranch_scc0 .LBB0_10",
    ".LBB0_6:                                ; =>This Inner Loop Header: Depth=1",
    "\tglobal_load_dwordx4 v[2:5], v[2:3], off",
    "\tbuffer_load_dword v6, v7, s[0:3], 0 offen",
    "\ts_branch .LBB0_5",
    "\tv_mov_b32_e32 v1, v2",
    ".LBB0_10:",
    "\tv_rcp_f32_e32 v3, v3",
    ".LBB0_11:",
    "\ts_endpgm",
    ".Lfunc_end0:",
)


def test_amd():
    found = amd(*ROTATED)
    assert found.loops
    assert found.instructions == 7
    assert found.special == 1
    assert found.conversions == 0
    assert found.loads == {16: 1, 4: 1}
    assert found.stores == {2: 1}
    assert found.outside == 5
    assert found.places["binning.py:107"] == 7
