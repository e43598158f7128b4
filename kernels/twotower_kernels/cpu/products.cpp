// Products of a few bf16 rows with weights that are read once, in place, as they lie in memory.
//
// At 1 to 64 rows such a product is bound by reading the weights; a library that packs them first, at every
// call, reads and writes them several times. Here an output is a dot product along a weight's row, for as many input
// rows at once as registers hold. Sums are fp32, in an order that depends on the row's length alone: a row has the
// same bits whatever other rows the batch has.

#include "vectors.h"

namespace {

// relu(v)^2
inline __m512 squared_if_positive(__m512 v) {
  const __m512 positive = _mm512_max_ps(_mm512_setzero_ps(), v);  // of NaN and 0 the second operand: keeps NaN
  return _mm512_mul_ps(positive, positive);
}

// x[r] . w[o] for kRows x kOut = 16 pairs, at r * kOut + o; rows of w (.., inner) lie `inner` elements apart.
template <int kRows, int kOut>
inline __attribute__((always_inline)) __m512 tile(const bf16* const* x, const bf16* w, int64_t inner) {
  __m512 acc[16];
  for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_ps();
  int64_t at = 0;
  for (; at + kLane <= inner; at += kLane) {
    __m512bh rows[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) rows[r] = load(x[r] + at);
#pragma GCC unroll 16
    for (int o = 0; o < kOut; o++) {
      const __m512bh weight = load(w + o * inner + at);
      // Prefetches the next rows, since these are too many streams for the hardware. Beyond the last row it does no harm.
      _mm_prefetch(reinterpret_cast<const char*>(w + (o + kOut) * inner + at), _MM_HINT_T0);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) acc[r * kOut + o] = _mm512_dpbf16_ps(acc[r * kOut + o], rows[r], weight);
    }
  }
  if (at < inner) {
    const int left = inner - at;
    for (int o = 0; o < kOut; o++) {
      const __m512bh weight = load(w + o * inner + at, left);
      for (int r = 0; r < kRows; r++) acc[r * kOut + o] = _mm512_dpbf16_ps(acc[r * kOut + o], load(x[r] + at, left), weight);
    }
  }
  return sums(acc);
}

// emit(row, output, values): 16 outputs of a row, for all rows and outputs [first, last) of w (.., inner). Where fewer than
// 16 are left, the last 16 of `outputs` are computed again: `outputs` is at least 16.
template <typename Emit>
inline __attribute__((always_inline)) void product(const bf16* const* x, int64_t rows, const bf16* w, int64_t inner,
                                                   int64_t first, int64_t last, Emit emit) {
  for (int64_t at = first; at < last; at += 16) {  // 16 weight rows stay in the cache while the input rows pass
    const int64_t o = at + 16 <= last ? at : last - 16;
    const bf16* here = w + o * inner;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      __m512 of[4];  // of[j]: rows r to r + 3, each with outputs o + 4 j to o + 4 j + 3
      for (int j = 0; j < 4; j++) of[j] = tile<4, 4>(x + r, here + 4 * j * inner, inner);
      const __m512 a = _mm512_shuffle_f32x4(of[0], of[1], 0x44), b = _mm512_shuffle_f32x4(of[2], of[3], 0x44);
      const __m512 c = _mm512_shuffle_f32x4(of[0], of[1], 0xee), d = _mm512_shuffle_f32x4(of[2], of[3], 0xee);
      emit(r, o, _mm512_shuffle_f32x4(a, b, 0x88));
      emit(r + 1, o, _mm512_shuffle_f32x4(a, b, 0xdd));
      emit(r + 2, o, _mm512_shuffle_f32x4(c, d, 0x88));
      emit(r + 3, o, _mm512_shuffle_f32x4(c, d, 0xdd));
    }
    if (r + 2 <= rows) {
      const __m512 low = tile<2, 8>(x + r, here, inner), high = tile<2, 8>(x + r, here + 8 * inner, inner);
      emit(r, o, _mm512_shuffle_f32x4(low, high, 0x44));
      emit(r + 1, o, _mm512_shuffle_f32x4(low, high, 0xee));
      r += 2;
    }
    if (r < rows) emit(r, o, tile<1, 16>(x + r, here, inner));
  }
}

}  // namespace

extern "C" {

// out (rows, outputs) = x (rows, inner) w^T, w (outputs, inner), outputs >= 16; rows of x lie `x_row` elements apart.
//
// bias (outputs) bf16 and add (rows, outputs) fp32 are added before rounding, if given; with `relu2` the result is relu(.)^2. It
// is rounded to bf16 once, and stored as fp32 if `wide`.
void tt_linear(const bf16* x, int64_t x_row, const bf16* w, const bf16* bias, const float* add, void* out, int64_t rows,
               int64_t inner, int64_t outputs, int relu2, int wide, int threads) {
  const int64_t part = 64, parts = outputs < part ? 1 : outputs / part;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t p = 0; p < parts; p++) {
    const int64_t first = p * part, last = p + 1 < parts ? first + part : outputs;
    const bf16* in[64];
    for (int64_t from = 0; from < rows; from += 64) {
      const int64_t count = rows - from < 64 ? rows - from : 64;
      for (int64_t i = 0; i < count; i++) in[i] = x + (from + i) * x_row;
      product(in, count, w, inner, first, last, [&](int64_t r, int64_t o, __m512 v) {
        const int64_t at = (from + r) * outputs + o;
        if (bias) v = _mm512_add_ps(v, load_wide(bias + o));
        if (add) v = _mm512_add_ps(v, _mm512_loadu_ps(add + at));
        if (relu2) v = squared_if_positive(v);
        if (wide)
          _mm512_storeu_ps(static_cast<float*>(out) + at, rounded(v));
        else
          store_bf16(static_cast<bf16*>(out) + at, v);
      });
    }
  }
}

// The routed experts of a layer: for each of n tokens, the sum over its k experts of weight * down(relu2(up(x))).
//
// hidden (n, size) bf16, rows `hidden_row` elements apart, experts (n, k), weights (n, k), up (count, width, size), down
// (count, size, width), out (n, size) fp32. Experts without a token are not read. 1 if memory ran out, 0 if done.
int tt_grouped_experts(const bf16* hidden, int64_t hidden_row, const int64_t* experts, const float* weights, const bf16* up,
                       const bf16* down, float* out, int64_t n, int64_t k, int64_t count, int64_t size, int64_t width,
                       int threads) {
  const int64_t rows = n * k;
  // For each expert, where its rows begin; and the (token, choice) of each row, in order.
  int64_t* starts = static_cast<int64_t*>(calloc(count + 1, sizeof(int64_t)));
  int64_t* order = static_cast<int64_t*>(malloc(rows * sizeof(int64_t)));
  bf16* mid = static_cast<bf16*>(malloc(rows * width * sizeof(bf16)));
  float* parts = static_cast<float*>(malloc(rows * size * sizeof(float)));
  const bf16** in = static_cast<const bf16**>(malloc(2 * rows * sizeof(bf16*)));
  if (!starts || !order || !mid || !parts || !in) {
    free(starts), free(order), free(mid), free(parts), free(in);
    return 1;
  }
  for (int64_t i = 0; i < rows; i++) starts[experts[i] + 1]++;
  for (int64_t e = 0; e < count; e++) starts[e + 1] += starts[e];
  int64_t* next = static_cast<int64_t*>(malloc((count + 1) * sizeof(int64_t)));
  if (!next) {
    free(starts), free(order), free(mid), free(parts), free(in);
    return 1;
  }
  memcpy(next, starts, count * sizeof(int64_t));
  for (int64_t i = 0; i < rows; i++) order[next[experts[i]]++] = i;
  free(next);
  const bf16** in_mid = in + rows;
  for (int64_t j = 0; j < rows; j++) {
    in[j] = hidden + order[j] / k * hidden_row;
    in_mid[j] = mid + j * width;
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t e = 0; e < count; e++) {
      const int64_t first = starts[e], own = starts[e + 1] - first;
      if (own == 0) continue;
      product(in + first, own, up + e * width * size, size, 0, width, [&](int64_t r, int64_t o, __m512 v) {
        store_bf16(mid + (first + r) * width + o, squared_if_positive(v));
      });
      product(in_mid + first, own, down + e * size * width, width, 0, size, [&](int64_t r, int64_t o, __m512 v) {
        const int64_t row = order[first + r];
        _mm512_storeu_ps(parts + row * size + o, _mm512_mul_ps(v, _mm512_set1_ps(weights[row])));
      });
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < n; t++) {
      float* to = out + t * size;
      memcpy(to, parts + t * k * size, size * sizeof(float));
      for (int64_t j = 1; j < k; j++) {
        const float* from = parts + (t * k + j) * size;
        for (int64_t i = 0; i < size; i++) to[i] += from[i];
      }
    }
  }
  free(starts), free(order), free(mid), free(parts), free(in);
  return 0;
}

}  // extern "C"
