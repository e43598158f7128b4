// The statistics of each position's logits that a step of unmasking needs.

#include "vectors.h"

extern "C" {

// Computes for each row of logits (rows, vocab) fp32: best, the index of the highest (of equal ones the first), highest, and total, the sum of
// exp(logit - highest), which is NaN where the row holds NaN or infinity, or nothing above -inf. Rows where wanted is 0: 0, 0, 1.
void tt_best(const float* logits, const uint8_t* wanted, int64_t* best, float* highest, float* total, int64_t rows, int64_t vocab,
             int threads) {
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t r = 0; r < rows; r++) {
    best[r] = 0, highest[r] = 0, total[r] = 1;
    if (!wanted[r]) continue;
    const float* row = logits + r * vocab;
    __m512 top = lowest;
    for (int64_t i = 0; i < vocab; i += kFloats)
      top = _mm512_max_ps(_mm512_mask_loadu_ps(lowest, lanes(vocab - i), row + i), top);  // passes over NaN
    highest[r] = _mm512_reduce_max_ps(top);
    const __m512 high = _mm512_set1_ps(highest[r]);
    __m512 sum = _mm512_setzero_ps();
    int64_t found = -1;
    for (int64_t i = 0; i < vocab; i += kFloats) {
      const __mmask16 mask = lanes(vocab - i);
      const __m512 v = _mm512_maskz_loadu_ps(mask, row + i);
      sum = _mm512_mask_add_ps(sum, mask, sum, exp(_mm512_sub_ps(v, high)));  // infinity - infinity is NaN
      const __mmask16 equal = _mm512_mask_cmpeq_ps_mask(mask, v, high);
      if (found < 0 && equal) found = i + __builtin_ctz(equal);
    }
    if (found >= 0) best[r] = found;
    total[r] = _mm512_reduce_add_ps(sum);
  }
}

}  // extern "C"
