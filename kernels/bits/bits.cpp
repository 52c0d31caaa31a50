// `pack_bits` and `unpack_bits` on the CPU, for any number of words; loops over words are cut to whole vectors.

#include <cstdint>

namespace {

constexpr int LANES = 16;

// Bit `k` of word `j` is boolean `k * words + j`; those from `count` on do not exist.
template <int N> inline void pack(const uint8_t* mask, int64_t words, uint32_t* packed) {
    uint32_t word[N] = {};
    for (int k = 0; k < 32; k++)
#pragma omp simd
        for (int j = 0; j < N; j++) word[j] |= uint32_t(mask[k * words + j]) << k;
    for (int j = 0; j < N; j++) packed[j] = word[j];
}

void pack_group(const uint8_t* mask, int64_t words, int64_t count, uint32_t* packed) {
    if (count >= 32 * words) {
        int64_t j = 0;
        for (; j + LANES <= words; j += LANES) pack<LANES>(mask + j, words, packed + j);
        if (j < words && words >= LANES) pack<LANES>(mask + words - LANES, words, packed + words - LANES);
        else for (; j < words; j++) pack<1>(mask + j, words, packed + j);
        return;
    }
    for (int64_t j = 0; j < words; j++) packed[j] = 0;
    for (int64_t i = 0; i < count; i++) packed[i % words] |= uint32_t(mask[i]) << (i / words);
}

template <int N> inline void unpack(const uint32_t* packed, int64_t words, uint8_t* mask) {
    uint32_t word[N];
    for (int j = 0; j < N; j++) word[j] = packed[j];
    for (int k = 0; k < 32; k++)
#pragma omp simd
        for (int j = 0; j < N; j++) mask[k * words + j] = uint8_t(word[j] >> k & 1);
}

void unpack_group(const uint32_t* packed, int64_t words, int64_t count, uint8_t* mask) {
    if (count >= 32 * words) {
        int64_t j = 0;
        for (; j + LANES <= words; j += LANES) unpack<LANES>(packed + j, words, mask + j);
        if (j < words && words >= LANES) unpack<LANES>(packed + words - LANES, words, mask + words - LANES);
        else for (; j < words; j++) unpack<1>(packed + j, words, mask + j);
        return;
    }
    for (int64_t i = 0; i < count; i++) mask[i] = uint8_t(packed[i % words] >> (i / words) & 1);
}

template <class Body> void for_groups(int64_t numel, int64_t group, int threads, Body body) {
    const int64_t groups = (numel + group - 1) / group;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t g = 0; g < groups; g++) body(g, numel - g * group);
}

}  // namespace

extern "C" void pack_bits(const uint8_t* mask, int64_t numel, int64_t words, uint32_t* packed, int threads) {
    for_groups(numel, 32 * words, threads, [=](int64_t g, int64_t left) {
        pack_group(mask + g * 32 * words, words, left, packed + g * words);
    });
}

extern "C" void unpack_bits(const uint32_t* packed, int64_t numel, int64_t words, uint8_t* mask, int threads) {
    for_groups(numel, 32 * words, threads, [=](int64_t g, int64_t left) {
        unpack_group(packed + g * words, words, left, mask + g * 32 * words);
    });
}
