// TARGET_CLONES compiles a function for AVX-512, AVX2 and the baseline; the loader picks one at run
// time. Functions that such a function calls must be ALWAYS_INLINE, to be compiled for the same
// instruction set.
#pragma once

#define ALWAYS_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GLIBC__) && \
    ((defined(__clang__) && __clang_major__ >= 18) || (!defined(__clang__) && __GNUC__ >= 12))
#define TARGET_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TARGET_CLONES
#endif
