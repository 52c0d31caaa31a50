// What the source of a program over edges begins with (generate.py).
#include <cstdint>
#include <cstring>
#include <limits>

template <class V> struct Row {  // of zeros
  V* const data;
  explicit Row(int64_t size) : data(new V[size]()) {}
  ~Row() { delete[] data; }
};
struct bf16 { uint16_t bits; };
static inline float load(const bf16* p, int64_t i) { return __builtin_bit_cast(float, (uint32_t)p[i].bits << 16); }
static inline float load(const float* p, int64_t i) { return p[i]; }
static inline double load(const double* p, int64_t i) { return p[i]; }
static inline bool load(const uint8_t* p, int64_t i) { return p[i] != 0; }
template <class V> static inline void store(V* p, int64_t i, V x) { p[i] = x; }
static inline void store(float* p, int64_t i, double x) { p[i] = (float)x; }
static inline void store(uint8_t* p, int64_t i, bool x) { p[i] = x; }
static inline void store(bf16* p, int64_t i, float x) {
  uint32_t u = __builtin_bit_cast(uint32_t, x);
  p[i].bits = x != x ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline float rounded(float x) {
  bf16 r;
  store(&r, 0, x);
  return load(&r, 0);
}
// e^x to the last bit or two, without branches, so that loops of it are vectorised (after Cephes).
static inline float exp_(float x) {
  float c = x < -104.f ? -104.f : (x > 89.f ? 89.f : x);
  float n = (c * 1.44269504f + 12582912.f) - 12582912.f;
  float r = (c - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  int32_t m = (int32_t)(n == n ? n : 0.f), half = m >> 1;  // in two steps: to infinity, and to what is not normal
  p = p * __builtin_bit_cast(float, (half + 127) << 23) * __builtin_bit_cast(float, (m - half + 127) << 23);
  return x == x ? p : x;
}
static inline double exp_(double x) { return __builtin_exp(x); }
static inline float tanh_(float x) {
  float a = __builtin_fabsf(x), t = exp_(-2.f * a), far = (1.f - t) / (1.f + t), s = x * x;
  float near = x * (1.f + s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f))));
  return a < 0.3f ? near : (x < 0.f ? -far : far);
}
static inline double tanh_(double x) { return __builtin_tanh(x); }
// Rows of bits, the first in the lowest place, from and to rows of bytes that are 0 or 1; eight bytes more are written.
static inline void unpack(const uint8_t* bits, int64_t size, uint8_t* row) {
  for (int64_t f = 0; f < size; f += 8) {
    uint64_t x = (bits[f >> 3] * 0x0101010101010101ull) & 0x8040201008040201ull;
    x = ((x + 0x7f7f7f7f7f7f7f7full) >> 7) & 0x0101010101010101ull;
    memcpy(row + f, &x, 8);
  }
}
static inline void copy(const uint8_t* bits, int64_t size, uint8_t* row) {
  for (int64_t f = 0; f < size; f++) row[f] = bits[f];
}
static inline uint32_t word(const uint8_t* bits, int64_t first) {  // of `BLOCK` bits at least
  uint32_t x;
  memcpy(&x, bits + (first >> 3), 4);
  return x >> (first & 7);
}
static inline void pack(uint8_t* row, int64_t size, uint8_t* bits) {
  memset(row + size, 0, 8);
  for (int64_t f = 0; f < size; f += 8) {
    uint64_t x;
    memcpy(&x, row + f, 8);
    bits[f >> 3] = (uint8_t)((x * 0x0102040810204080ull) >> 56);
  }
}
template <class V> static inline V larger(V a, V b) { return a > b || a != a ? a : b; }
template <class V> static inline V smaller(V a, V b) { return a < b || a != a ? a : b; }
