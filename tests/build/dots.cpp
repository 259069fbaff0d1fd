// The products of pairs of bf16 of vec_avx512_bf16.h on the vectors in a file: dot(a, b, c), to_factor(c) and to_pairs
// of c and the bits of a. Compiled with AVX512_BF16, by its instructions, and without, by their emulation.
#include <cstdio>

#include "cpu/vec.h"

using namespace ipt_fast::cpu;

int main(int, char** arguments) {
    FILE *in = fopen(arguments[1], "rb"), *out = fopen(arguments[2], "wb");
    struct {
        uint32_t a[kLanes], b[kLanes];
        float c[kLanes];
    } vectors;
    while (fread(&vectors, sizeof(vectors), 1, in) == 1) {
        const Bits a = load(reinterpret_cast<const Pair*>(vectors.a)),
                   b = load(reinterpret_cast<const Pair*>(vectors.b));
        const Vec c = load(vectors.c), sum = dot(a, b, c);
        const HalfBits factor = to_factor(c);
        const Bits pairs = to_pairs(c, (Vec)a);
        fwrite(&sum, sizeof(sum), 1, out);
        fwrite(&factor, sizeof(factor), 1, out);
        fwrite(&pairs, sizeof(pairs), 1, out);
    }
    return fclose(out);
}
