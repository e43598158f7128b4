// RMSNorm with adaptive shift and scale in both orders, and the gated residual before it, in one pass. All arithmetic is
// fp32, rounded once where a result is stored.

#include <math.h>

#include "vectors.h"

extern "C" {

// added = h + gate x; out = norm of added, with modulate(v) = v (1 + scale) + shift before it if `modulate_first`, else after it.
//
// h, x, added, out (rows, size) bf16, contiguous; without x, added is not written and h itself is normed. gate, shift and scale bf16, or null:
// one row of `size` for each `length` rows of h, `gate_row` and `mod_row` elements apart. weight (size) fp32.
void tt_modulated_norm(const bf16* h, const bf16* x, const bf16* gate, int64_t gate_row, const bf16* shift, const bf16* scale, int64_t mod_row,
                       int modulate_first, const float* weight, float eps, bf16* added, bf16* out, int64_t rows, int64_t length,
                       int64_t size, int threads) {
  const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * size > 32768)
  for (int64_t r = 0; r < rows; r++) {
    const bf16* gates = gate ? gate + r / length * gate_row : nullptr;
    const bf16* shifts = shift ? shift + r / length * mod_row : nullptr;
    const bf16* scales = scale ? scale + r / length * mod_row : nullptr;
    const bf16* from = h + r * size;
    const auto modulate = [&](__m512 v, int64_t i, __mmask16 mask) {
      return _mm512_fmadd_ps(v, _mm512_add_ps(one, load_wide(scales + i, mask)), load_wide(shifts + i, mask));
    };
    const auto before = [&](int64_t i, __mmask16 mask) {
      const __m512 v = load_wide(from + i, mask);
      return shift && modulate_first ? modulate(v, i, mask) : v;
    };
    if (x) {
      for (int64_t i = 0; i < size; i += kFloats) {
        const __mmask16 mask = lanes(size - i);
        __m512 v = load_wide(x + r * size + i, mask);
        if (gates) v = _mm512_mul_ps(v, load_wide(gates + i, mask));
        store_bf16(added + r * size + i, _mm512_add_ps(load_wide(from + i, mask), v), mask);
      }
      from = added + r * size;
    }
    __m512 square = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += kFloats) {
      const __mmask16 mask = lanes(size - i);
      const __m512 v = before(i, mask);
      square = _mm512_mask3_fmadd_ps(v, v, square, mask);
    }
    const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(square) / size + eps));
    for (int64_t i = 0; i < size; i += kFloats) {
      const __mmask16 mask = lanes(size - i);
      __m512 v = _mm512_mul_ps(_mm512_mul_ps(before(i, mask), factor), _mm512_maskz_loadu_ps(mask, weight + i));
      if (shift && !modulate_first) v = modulate(v, i, mask);
      store_bf16(out + r * size + i, v, mask);
    }
  }
}

}  // extern "C"
