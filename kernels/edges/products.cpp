// What the source of a program with matrix products begins with, behind head.cpp (generate_products.py).
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512F__
#define BYTES 64
#else
#define BYTES 32
#endif
typedef T vec __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
static const int64_t LANES = BYTES / sizeof(T), TILE = 8;
static inline int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }
static inline vec at(const T* p) { return *(const vec*)p; }
static inline void put(T* p, vec x) { *(vec*)p = x; }
// `size` vectors of the products of eight rows of `inner` elements with a matrix of rows of `stride`.
template <int64_t size>
static inline void columns_of(const T* a, const T* w, T* out, int64_t inner, int64_t stride) {
  vec c[TILE][size] = {};
  for (int64_t x = 0; x < inner; x++) {
    for (int64_t s = 0; s < size; s++) {
      const vec row = at(w + x * stride + s * LANES);
      for (int64_t m = 0; m < TILE; m++) c[m][s] += a[m * inner + x] * row;
    }
  }
  for (int64_t m = 0; m < TILE; m++)
    for (int64_t s = 0; s < size; s++) put(out + m * stride + s * LANES, c[m][s]);
}
static inline void product(const T* a, const T* w, T* out, int64_t inner, int64_t stride) {
  int64_t f = 0;
  for (; f + 2 * LANES <= stride; f += 2 * LANES) columns_of<2>(a, w + f, out + f, inner, stride);
  if (f < stride) columns_of<1>(a, w + f, out + f, inner, stride);
}
// Adds the outer products of eight pairs of rows to a matrix.
static inline void outer(const T* a, const T* b, T* sum, int64_t inner, int64_t stride) {
  for (int64_t f = 0; f < stride; f += LANES) {
    vec row[TILE];
    for (int64_t m = 0; m < TILE; m++) row[m] = at(b + m * stride + f);
    for (int64_t x = 0; x < inner; x++) {
      vec total = at(sum + x * stride + f);
      for (int64_t m = 0; m < TILE; m++) total += a[m * inner + x] * row[m];
      put(sum + x * stride + f, total);
    }
  }
}
static inline void flush(T* part, T* sum, int64_t size) {
  for (int64_t f = 0; f < size; f++) { sum[f] += part[f]; part[f] = 0; }
}
