// `quantize` and `dequantize` on the CPU, bit for bit what `quantize_reference` and `dequantize_reference` give.
// `cpu.py` defines KIND, of the elements, BITS, ENCODE_TERMS and DECODE_TERMS above this text, and BLOCK, WORDS, GROUP
// and BLOCKS, which may be zero: then they are arguments like all else of a format, and the code serves more formats at
// half the speed.
//
// A group is worked on in a buffer of float32 that stays in the nearest cache. Inner loops are over LANES words of four
// planes, or over a block, and the compiler makes vectors of them: Inductor's flags turn gcc's vectoriser off, `cpu.py`
// turns it on again, and `omp simd` asks for it, loop by loop. Groups with infinities, NaN or the largest of numbers
// take a second form of the same loops, CAREFUL.

#include <cstdint>
#include <cstring>
#include <limits>

// `BlockFormat`, and its maps: a slope, then lower end, upper end and change of slope of each term.
struct Format {
    int32_t block, words, group, blocks, bfloat16;  // elements, words and blocks of a group
    float limit, encode_slope, decode_slope, encode[16][3], decode[16][3];
};

namespace {

constexpr int PLANES = 32 / BITS, TOP = (1 << BITS) - 1, LANES = 16, MOST_BLOCKS = 32;
constexpr float INFINITE = std::numeric_limits<float>::infinity(), LARGEST = std::numeric_limits<float>::max();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr float SMALLEST_HALF_RANGE = 0x1p-100f, WIDE_HALF_RANGE = 0x1p125f, SMALLEST_NORMAL = 0x1p-126f;
constexpr int32_t INFINITE_BITS = 0x7f800000;

inline int block_of(const Format& f) { return BLOCK ? BLOCK : f.block; }
inline int words_of(const Format& f) { return WORDS ? WORDS : f.words; }
inline int group_of(const Format& f) { return GROUP ? GROUP : f.group; }
inline int blocks_of(const Format& f) { return BLOCKS ? BLOCKS : f.blocks; }

enum Kind { FLOAT32, BFLOAT16, FLOAT16 };

inline int32_t bits_of(float x) { int32_t b; std::memcpy(&b, &x, 4); return b; }
inline float float_of(int32_t b) { float x; std::memcpy(&x, &b, 4); return x; }
inline float clamp(float x, float lower, float upper) {  // NaN stays
    x = x < lower ? lower : x;
    return x > upper ? upper : x;
}

// ---- elements ----

// `store<true>` is of numbers far from overflow. FLOAT16 keeps what is finite so.
template <int> struct Element;
template <> struct Element<FLOAT32> {
    using Raw = float;
    static constexpr float MOST = LARGEST, CALM = 0x1p125f;
    static inline float load(float x) { return x; }
    template <bool> static inline float store(float x) { return x; }
};
template <> struct Element<BFLOAT16> {
    using Raw = uint16_t;
    static constexpr float MOST = 0x1.fep127f, CALM = 0x1p125f;
    static inline float load(uint16_t x) { return float_of(int32_t(uint32_t(x) << 16)); }
    template <bool KNOWN> static inline uint16_t store(float x) {  // to nearest even
        uint32_t b = uint32_t(bits_of(x)), rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
        return uint16_t(KNOWN || x == x ? rounded : 0x7fc0);
    }
};
template <> struct Element<FLOAT16> {
    using Raw = uint16_t;
    static constexpr float MOST = 65504.0f, CALM = 65504.0f;
    static inline float load(uint16_t x) {
        int32_t magnitude = (x & 0x7fff) << 13;
        float scaled = float_of(magnitude) * 0x1p112f;
        int32_t b = magnitude >= 0x0f800000 ? magnitude | INFINITE_BITS : bits_of(scaled);
        return float_of(b | int32_t(uint32_t(x & 0x8000) << 16));
    }
    template <bool> static inline uint16_t store(float x) {  // to nearest even
        uint32_t b = uint32_t(bits_of(x)), magnitude = b & 0x7fffffff;
        uint32_t small = uint32_t(bits_of(float_of(int32_t(magnitude)) + 0.5f)) - 0x3f000000u;
        uint32_t normal = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
        uint32_t result = magnitude < 0x38800000u ? small : normal;
        result = magnitude >= 0x477fe000u ? 0x7bffu : result;
        result = magnitude >= 0x7f800000u ? (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u) : result;
        return uint16_t(result | (b >> 16 & 0x8000));
    }
};

// Calls `body(i, column)` for elements i = 0 .. count - 1, which start at element `start` of rows of `width`.
template <class Body> inline void by_column(int64_t start, int64_t width, int count, Body body) {
    int64_t column = start % width;
    for (int i = 0; i < count;) {
        int run = int(width - column < count - i ? width - column : count - i);
#pragma omp simd
        for (int j = 0; j < run; j++) body(i + j, column + j);
        i += run;
        column = 0;
    }
}

void load(const void* x, int64_t start, int count, const float* shift, const float* scale, int64_t width, float* out) {
    const auto* from = static_cast<const Element<KIND>::Raw*>(x) + start;
    if (scale)
        by_column(start, width, count, [=](int i, int64_t column) {
            out[i] = (Element<KIND>::load(from[i]) - shift[column]) * scale[column];
        });
    else
#pragma omp simd
        for (int i = 0; i < count; i++) out[i] = Element<KIND>::load(from[i]);
}

template <bool CALM>
void store(const float* v, int64_t start, int count, const float* shift, const float* inverse, int64_t width, void* x) {
    auto* to = static_cast<Element<KIND>::Raw*>(x) + start;
    if (inverse)
        by_column(start, width, count, [=](int i, int64_t column) {
            to[i] = Element<KIND>::store<false>(v[i] * inverse[column] + shift[column]);
        });
    else
#pragma omp simd
        for (int i = 0; i < count; i++) to[i] = Element<KIND>::store<CALM>(v[i]);
}

// ---- what both directions compute ----

// The block of plane `k`; both numbers are powers of two, since the group's blocks are of whole planes.
inline int of_plane(const Format& f, int k) { return k * blocks_of(f) / PLANES; }

// `apply_map`, of what is not negative: such floats are ordered like integers, which have a minimum and a maximum in
// one instruction each.
template <int TERMS> inline float bend(float t, float slope, const float (&terms)[16][3]) {
    if (TERMS == 0) return t;
    float result = t * slope;
#pragma GCC unroll 16
    for (int i = 0; i < TERMS; i++) {
        int32_t b = bits_of(t), lower = bits_of(terms[i][0]), upper = bits_of(terms[i][1]);
        b = b < lower ? lower : b;
        b = b > upper ? upper : b;
        result = result + (float_of(b) - terms[i][0]) * terms[i][2];
    }
    return result;
}

inline float cut(float x, bool away) {
    int32_t b = bits_of(x);
    return float_of((away ? int32_t(uint32_t(b) + 0xffff) : b) & -65536);
}

inline float half_range(float low, float high) {
    float half = high * 0.5f - low * 0.5f;
    return half < SMALLEST_HALF_RANGE ? SMALLEST_HALF_RANGE : half;
}

// ---- encoding ----

// Integers in the order of floats, both ways; NaN lies beyond the infinities.
inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// What the codes of a block are made with.
struct Block {
    float half_low, inverse;
    bool nan, marked, above, below;  // for CAREFUL: it holds NaN, infinities, infinities of one sign, of the other
};

inline void set_scale(Block& block, float low, float high, int top) {
    block.half_low = low * 0.5f;
    block.inverse = (1.0f / half_range(low, high)) * (top * 256.0f);
}

// The least and the greatest of `count` floats, as ordered integers; `count` is a multiple of LANES.
inline void extremes(const float* v, int count, int32_t& lowest, int32_t& highest) {
    int32_t least = lowest, most = highest;
#pragma omp simd reduction(min : least) reduction(max : most)
    for (int i = 0; i < (count & -LANES); i++) {
        int32_t x = ordered(bits_of(v[i]));
        least = x < least ? x : least;
        most = x > most ? x : most;
    }
    lowest = least, highest = most;
}

// The ends of all blocks; false if not all elements are finite and within the limit.
bool calm_ends(const Format& f, const float* v, Block* blocks, float* low, float* high) {
    const int count = blocks_of(f);
    int32_t lowest[MOST_BLOCKS], highest[MOST_BLOCKS], all_lowest = 0, all_highest = 0;
    for (int b = 0; b < count; b++, v += block_of(f)) {
        int32_t least = std::numeric_limits<int32_t>::max(), most = std::numeric_limits<int32_t>::min();
        if (block_of(f) >= LANES) {
            extremes(v, block_of(f), least, most);
            if (block_of(f) % LANES) extremes(v + block_of(f) - LANES, LANES, least, most);
        } else {
            for (int i = 0; i < block_of(f); i++) {
                int32_t x = ordered(bits_of(v[i]));
                least = x < least ? x : least;
                most = x > most ? x : most;
            }
        }
        lowest[b] = least, highest[b] = most;
        all_lowest = least < all_lowest ? least : all_lowest;
        all_highest = most > all_highest ? most : all_highest;
    }
#pragma omp simd
    for (int b = 0; b < count; b++) {
        float l = float_of(ordered(lowest[b])), h = float_of(ordered(highest[b]));
        if (f.bfloat16) l = cut(l, l < 0), h = cut(h, h > 0);
        low[b] = l, high[b] = h;
        set_scale(blocks[b], l, h, TOP);
    }
    return all_lowest >= ordered(bits_of(-f.limit)) && all_highest <= bits_of(f.limit);
}

// `widen` of the reference.
inline void widen(const Format& f, float& low, float& high) {
    if (low < high) return;
    const int32_t unit = f.bfloat16 ? 1 << 16 : 1;
    if (low >= f.limit) low = float_of(bits_of(low) - unit);
    else high = low < SMALLEST_NORMAL ? SMALLEST_NORMAL : float_of(bits_of(low) + unit);
}

// The ends of a block as they are stored; brings finite elements within the limit.
Block careful_ends(const Format& f, float* v, float& low, float& high) {
    int32_t lowest = bits_of(INFINITE), highest = ordered(bits_of(-INFINITE)), nan = 0, above = 0, below = 0;
#pragma omp simd reduction(min : lowest) reduction(max : highest) reduction(| : nan, above, below)
    for (int i = 0; i < block_of(f); i++) {
        int32_t magnitude = bits_of(v[i]) & 0x7fffffff, infinite = magnitude == INFINITE_BITS;
        nan |= magnitude > INFINITE_BITS;
        above |= infinite & (v[i] > 0);
        below |= infinite & (v[i] < 0);
        v[i] = infinite ? v[i] : clamp(v[i], -f.limit, f.limit);
        int32_t x = ordered(bits_of(v[i])), least = infinite ? lowest : x, most = infinite ? highest : x;
        lowest = least < lowest ? least : lowest;
        highest = most > highest ? most : highest;
    }
    Block block{0, 0, nan != 0, !nan && (above || below), above != 0, below != 0};
    bool some = lowest <= highest;
    low = some ? float_of(ordered(lowest)) : 0.0f, high = some ? float_of(ordered(highest)) : 0.0f;
    if (f.bfloat16) low = cut(low, low < 0), high = cut(high, high > 0);
    if (block.marked && BITS > 1) {
        widen(f, low, high);
        set_scale(block, low, high, TOP - 2);
        float least = low;
        low = high, high = least;
    } else {
        set_scale(block, low, high, TOP);
        if (block.marked) {
            const float middle = low + (high * 0.5f - low * 0.5f);
            low = block.below ? -INFINITE : middle, high = block.above ? INFINITE : middle;
            block.nan = block.above && block.below;
        }
    }
    if (block.nan) low = high = NOT_A_NUMBER;
    return block;
}

// The code, in fixed point with eight places.
template <bool CAREFUL> inline int32_t fixed_code(const Format& f, float v, const Block& block, int32_t byte) {
    bool infinite = CAREFUL && !(v >= -f.limit && v <= f.limit);
    float position = ((infinite ? 0.0f : v) * 0.5f - block.half_low) * block.inverse;
    float bent = bend<ENCODE_TERMS>(position, f.encode_slope, f.encode);
    if (CAREFUL && BITS > 1) bent = block.marked ? position + 256.0f : bent;
    int32_t code = int32_t(bent + 0.5f) + byte;
    if (CAREFUL) {
        int32_t last = TOP << 8;
        if (BITS > 1) code = infinite ? (v > 0 ? last : 0) : code;
        else code = block.marked ? ((block.above ? v == INFINITE : v != -INFINITE) ? last : 0) : code;
        code = block.nan ? 0 : code;
    }
    return code;
}

// Every field enters its word at the upper end, and moves down as others follow.
template <bool CAREFUL>
void pack(const Format& f, const float* v, const Block* blocks, uint32_t index, const uint32_t* seed, uint32_t* words) {
    const uint32_t first = seed[0], second = seed[1];
    for (int start = 0; start < words_of(f); start += LANES) {
        alignas(64) uint32_t random[LANES], word[LANES] = {};
#pragma omp simd
        for (int j = 0; j < LANES; j++) {
            uint32_t h = index + uint32_t(start + j) + first;
            h = (h ^ h >> 16) * 0x85EBCA6Bu ^ second;
            h = (h ^ h >> 13) * 0xC2B2AE35u;
            random[j] = h ^ h >> 16;
        }
        for (int k = 0; k < PLANES; k += 4) {
            const float* plane = v + k * words_of(f) + start;
            const float *plane1 = plane + words_of(f), *plane2 = plane1 + words_of(f), *plane3 = plane2 + words_of(f);
            const Block block = blocks[of_plane(f, k)], block1 = blocks[of_plane(f, k + 1)];
            const Block block2 = blocks[of_plane(f, k + 2)], block3 = blocks[of_plane(f, k + 3)];
            auto push = [](uint32_t word, int32_t fixed) {
                return word >> BITS | (uint32_t(fixed) << (24 - BITS) & uint32_t(TOP) << (32 - BITS));
            };
#pragma omp simd
            for (int j = 0; j < LANES; j++) {
                uint32_t bytes = random[j], next = bytes * 1664525u + 1013904223u, w = word[j];
                random[j] = next ^ next >> 16;
                w = push(w, fixed_code<CAREFUL>(f, plane[j], block, int32_t(bytes & 0xff)));
                w = push(w, fixed_code<CAREFUL>(f, plane1[j], block1, int32_t(bytes >> 8 & 0xff)));
                w = push(w, fixed_code<CAREFUL>(f, plane2[j], block2, int32_t(bytes >> 16 & 0xff)));
                w = push(w, fixed_code<CAREFUL>(f, plane3[j], block3, int32_t(bytes >> 24)));
                word[j] = w;
            }
        }
        if (words_of(f) - start >= LANES) std::memcpy(words + start, word, 4 * LANES);
        else std::memcpy(words + start, word, 4 * (words_of(f) - start));
    }
}

void remove_unused(const Format& f, uint32_t* words, int count) {
    for (int i = count; i < PLANES * words_of(f); i++)
        words[i % words_of(f)] &= ~(uint32_t(TOP) << BITS * (i / words_of(f)));
}

struct Encoding {
    Format format;
    const void* x;
    int64_t numel;
    const float *shift, *scale;
    int64_t width;
    const uint32_t* seed;
    uint32_t* words;
    void *low, *high;
};

void encode_group(const Encoding& e, int64_t group, float* buffer) {
    const Format& f = e.format;
    const int slots = PLANES * words_of(f);
    const int64_t start = group * group_of(f), left = e.numel - start;
    const int count = left < group_of(f) ? int(left) : group_of(f);
    const float* v = buffer;
    if (KIND == FLOAT32 && !e.scale && slots == group_of(f) && left >= slots + LANES) {
        v = static_cast<const float*>(e.x) + start;
    } else {
        load(e.x, start, count, e.shift, e.scale, e.width, buffer);
        // Elements behind the last one are like the first of their block; their codes are removed afterwards.
        for (int i = count; i < group_of(f); i++)
            buffer[i] = i / block_of(f) * block_of(f) < count ? buffer[i / block_of(f) * block_of(f)] : 0.0f;
    }
    Block blocks[MOST_BLOCKS] = {};
    float low[MOST_BLOCKS], high[MOST_BLOCKS];
    const bool calm = calm_ends(f, v, blocks, low, high);
    uint32_t* words = e.words + group * words_of(f);
    const uint32_t index = uint32_t(group * words_of(f));
    if (calm) {
        pack<false>(f, v, blocks, index, e.seed, words);
    } else {
        if (v != buffer) std::memcpy(buffer, v, 4 * group_of(f));
        for (int b = 0; b < blocks_of(f); b++) blocks[b] = careful_ends(f, buffer + b * block_of(f), low[b], high[b]);
        pack<true>(f, buffer, blocks, index, e.seed, words);
    }
    if (count < slots) remove_unused(f, words, count);
    for (int b = 0; b < blocks_of(f); b++) {
        const int64_t at = group * blocks_of(f) + b;
        if (f.bfloat16) {
            static_cast<uint16_t*>(e.low)[at] = Element<BFLOAT16>::store<false>(low[b]);
            static_cast<uint16_t*>(e.high)[at] = Element<BFLOAT16>::store<false>(high[b]);
        } else {
            static_cast<float*>(e.low)[at] = low[b], static_cast<float*>(e.high)[at] = high[b];
        }
    }
}

// ---- decoding ----

// LANES words' fields of four planes from `k` on, of blocks within CALM.
inline void unpack_calm(const Format& f, const uint32_t* word, const float* step, const float* low, int k, int count,
                        float* out) {
    float *out1 = out + words_of(f), *out2 = out1 + words_of(f), *out3 = out2 + words_of(f);
    const float slope = f.decode_slope, step0 = step[0], step1 = step[1], step2 = step[2], step3 = step[3];
    const float low0 = low[0], low1 = low[1], low2 = low[2], low3 = low[3];
    auto level = [&](uint32_t code) { return bend<DECODE_TERMS>(float(int32_t(code & TOP)), slope, f.decode); };
    alignas(64) float x[4][LANES];
#pragma omp simd
    for (int j = 0; j < LANES; j++) {
        uint32_t packed = word[j] >> BITS * k;
        x[0][j] = level(packed) * step0 + low0;
        x[1][j] = level(packed >> BITS) * step1 + low1;
        x[2][j] = level(packed >> 2 * BITS) * step2 + low2;
        x[3][j] = level(packed >> 3 * BITS) * step3 + low3;
    }
    std::memcpy(out, x[0], 4 * count);
    std::memcpy(out1, x[1], 4 * count);
    std::memcpy(out2, x[2], 4 * count);
    std::memcpy(out3, x[3], 4 * count);
}

// Plane `k`, of any block.
void unpack_careful(const Format& f, const uint32_t* words, float first, float second, bool standardised, int k,
                    float* out) {
    const bool ends = BITS == 1 && !(first >= -LARGEST && first <= LARGEST && second >= -LARGEST && second <= LARGEST);
    const bool marked = BITS > 1 && first > second;
    const float low = marked ? second : first, high = marked ? first : second, half = half_range(low, high);
    const bool wide = half > WIDE_HALF_RANGE;
    const float shrink = wide ? 0.25f : 1.0f, grow = wide ? 4.0f : 1.0f, most = standardised ? LARGEST : Element<KIND>::MOST;
    const float step = half * shrink * (2.0f / (marked ? TOP - 2 : TOP)), minimum = low * shrink;
#pragma omp simd
    for (int j = 0; j < words_of(f); j++) {
        int32_t code = int32_t(words[j] >> BITS * k & TOP);
        float level = bend<DECODE_TERMS>(float(code), f.decode_slope, f.decode);
        level = marked ? float(code) - 1.0f : level;
        float x = clamp((level * step + minimum) * grow, -most, most);
        float end = code ? (ends ? second : INFINITE) : (ends ? first : -INFINITE);
        out[j] = ends || (marked && (code == 0 || code == TOP)) ? end : x;
    }
}

struct Decoding {
    Format format;
    const uint32_t* words;
    const void *low, *high;
    int64_t numel;
    const float *shift, *inverse;
    int64_t width;
    void* x;
};

void decode_group(const Decoding& d, int64_t group, float* buffer) {
    const Format& f = d.format;
    const int64_t start = group * group_of(f), left = d.numel - start;
    const int count = left < group_of(f) ? int(left) : group_of(f);
    const uint32_t* words = d.words + group * words_of(f);
    const bool direct = KIND == FLOAT32 && !d.inverse && words_of(f) % LANES == 0 && count == PLANES * words_of(f);
    float* v = direct ? static_cast<float*>(d.x) + start : buffer;
    float low[MOST_BLOCKS], high[MOST_BLOCKS], step[MOST_BLOCKS];
    int32_t calm = 1;
    for (int b = 0; b < blocks_of(f); b++) {
        const int64_t at = group * blocks_of(f) + b;
        if (f.bfloat16) {
            low[b] = Element<BFLOAT16>::load(static_cast<const uint16_t*>(d.low)[at]);
            high[b] = Element<BFLOAT16>::load(static_cast<const uint16_t*>(d.high)[at]);
        } else {
            low[b] = static_cast<const float*>(d.low)[at], high[b] = static_cast<const float*>(d.high)[at];
        }
        step[b] = half_range(low[b], high[b]) * (2.0f / TOP);
        calm &= (low[b] <= high[b]) & (low[b] >= -Element<KIND>::CALM) & (high[b] <= Element<KIND>::CALM);
    }
    if (!calm) {
        for (int k = 0; k < PLANES; k++) {
            const int b = of_plane(f, k);
            unpack_careful(f, words, low[b], high[b], d.inverse != nullptr, k, v + k * words_of(f));
        }
    } else {
        for (int k = 0; k < PLANES; k += 4) {
            float steps[4], lows[4];
            for (int r = 0; r < 4; r++) steps[r] = step[of_plane(f, k + r)], lows[r] = low[of_plane(f, k + r)];
            for (int j = 0; j < words_of(f); j += LANES) {
                alignas(64) uint32_t word[LANES];
                if (words_of(f) - j >= LANES) {
                    std::memcpy(word, words + j, 4 * LANES);
                    unpack_calm(f, word, steps, lows, k, LANES, v + k * words_of(f) + j);
                } else {
                    std::memcpy(word, words + j, 4 * (words_of(f) - j));
                    unpack_calm(f, word, steps, lows, k, words_of(f) - j, v + k * words_of(f) + j);
                }
            }
        }
    }
    if (direct) return;
    if (calm) store<true>(v, start, count, d.shift, d.inverse, d.width, d.x);
    else store<false>(v, start, count, d.shift, d.inverse, d.width, d.x);
}

struct Buffer {  // <vector> takes a compiler longer than half of this text
    float* const data;
    explicit Buffer(int64_t size) : data(new float[size]()) {}
    ~Buffer() { delete[] data; }
};

template <class Body> void for_groups(const Format& f, int64_t numel, int threads, Body body) {
    const int64_t groups = (numel + group_of(f) - 1) / group_of(f);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Buffer buffer(int64_t(PLANES) * words_of(f) + block_of(f) + 2 * LANES);
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; group++) body(group, buffer.data);
    }
}

}  // namespace

extern "C" void quantize(const Format* format, const void* x, int64_t numel, const float* shift, const float* scale,
                         int64_t width, const uint32_t* seed, uint32_t* words, void* low, void* high, int threads) {
    const Encoding e{*format, x, numel, shift, scale, width, seed, words, low, high};
    for_groups(*format, numel, threads, [&](int64_t group, float* buffer) { encode_group(e, group, buffer); });
}

extern "C" void dequantize(const Format* format, const uint32_t* words, const void* low, const void* high,
                           int64_t numel, const float* shift, const float* inverse, int64_t width, void* x,
                           int threads) {
    const Decoding d{*format, words, low, high, numel, shift, inverse, width, x};
    for_groups(*format, numel, threads, [&](int64_t group, float* buffer) { decode_group(d, group, buffer); });
}
