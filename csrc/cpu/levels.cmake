# The levels of the CPU's kernels, lowest first. This list is the only place that knows them: the build, the choice at
# run time, error messages, build_info and the tests follow from it.
#
# A level has a name, the family of processors that may have it (PROCESSOR, a regular expression; all without), what the
# processor must have (NEEDS, by the names of __builtin_cpu_supports, on Arm by those of HWCAP2_<name>) and its compiler's
# flags (FLAGS). The kernels are compiled for it with the vectors of vec_<name>.h.
#
# With LIKE, a level is not compiled: it has the kernels, and needs what they need, of another level above it in the
# list. What it has beside them is a MATRIX_UNIT, which multiplies matrices of bfloat16. With SPLITS it multiplies those
# of float32, too (thirds.h), and is in use only where IPT_FAST_CPU_ISA asks for it.
set(x86 "x86_64|AMD64")
set(arm "aarch64|arm64")

level(generic)

level(avx2 PROCESSOR ${x86} NEEDS avx2 fma f16c FLAGS -mavx2 -mfma -mf16c)

level(avx512 PROCESSOR ${x86} NEEDS avx2 fma f16c avx512f avx512bw avx512dq avx512vl
      FLAGS -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512)

# With IPT_FAST_EMULATE, for tests, the instructions that the level has beside avx512 are emulated.
if(NOT IPT_FAST_EMULATE)
  set(dots avx512bf16)
  set(dots_flag -mavx512bf16)
endif()
level(avx512_bf16 PROCESSOR ${x86} NEEDS avx2 fma f16c avx512f avx512bw avx512dq avx512vl ${dots}
      FLAGS ${dots_flag} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512)

level(amx PROCESSOR ${x86} LIKE avx512_bf16 MATRIX_UNIT)

level(amx_fp32 PROCESSOR ${x86} LIKE avx512_bf16 MATRIX_UNIT SPLITS)

level(neon PROCESSOR ${arm})

level(neon_bf16 PROCESSOR ${arm} NEEDS BF16 FLAGS -march=armv8.2-a+bf16)
