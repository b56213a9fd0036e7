// Shared code of the C++ operators: 16-lane vectors, exp and log, the interpolation grid in blocks of 16
// outputs, the task loop.
//
// Vectors use the GCC/Clang extension, so one source serves AVX-512, AVX2 and NEON; only some operations have
// an AVX-512 form. Shape suffixes as in reference.py: C classes, h w low-resolution size, H W full size.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace stpp {

constexpr int64_t kLanes = 16;
typedef float vfloat __attribute__((vector_size(64)));
typedef float vfloat_unaligned __attribute__((vector_size(64), aligned(4)));
typedef int32_t vint __attribute__((vector_size(64)));
#ifdef __AVX512F__
constexpr __mmask16 kAll = 0xffff;  // the unmasked forms of some intrinsics give warnings in GCC's own header
#endif

inline vfloat splat(float value) { return value - vfloat{}; }
inline vint splat_int(int32_t value) { return value - vint{}; }
inline vfloat load(const float* source) { return *reinterpret_cast<const vfloat_unaligned*>(source); }
inline vint load(const int32_t* source) {
  vint value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}
inline void store(float* target, vfloat value) { *reinterpret_cast<vfloat_unaligned*>(target) = value; }

inline vfloat vmax(vfloat a, vfloat b) {
#ifdef __AVX512F__
  return (vfloat)_mm512_maskz_max_ps(kAll, (__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

inline vfloat select(vint mask, vfloat yes, vfloat no) {
  return (vfloat)(((vint)yes & mask) | ((vint)no & ~mask));
}

template <typename Vector>
auto sum_lanes(Vector value) {
  auto total = value[0];
  for (int lane = 1; lane < kLanes; ++lane) total += value[lane];
  return total;
}

// table[index[lane]] for every lane; indices in 0..15.
inline vfloat permute(vfloat table, vint index) {
#ifdef __AVX512F__
  return (vfloat)_mm512_maskz_permutexvar_ps(kAll, (__m512i)index, (__m512)table);
#else
  vfloat out;
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = table[index[lane]];
  return out;
#endif
}

// table[index[lane]] for a table of two vectors; indices in 0..31.
inline vfloat permute(vfloat low, vfloat high, vint index) {
#ifdef __AVX512F__
  return (vfloat)_mm512_maskz_permutex2var_ps(kAll, (__m512)low, (__m512i)index, (__m512)high);
#else
  vfloat out;
  for (int lane = 0; lane < kLanes; ++lane)
    out[lane] = index[lane] < kLanes ? low[index[lane]] : high[index[lane] - kLanes];
  return out;
#endif
}

// table[index[lane]] for every lane, from memory.
inline vfloat gather(const float* table, vint index) {
#ifdef __AVX512F__
  return (vfloat)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), kAll, (__m512i)index, table, 4);
#else
  vfloat out;
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = table[index[lane]];
  return out;
#endif
}

// exp(x) for x <= 0 (softmax after subtracting the maximum); relative error about 2e-7; exp(-87) below -87.
// exp(x) = 2^n 2^r with n = round(x log2 e) and r in [-1/2, 1/2]; 2^r by the Taylor polynomial of degree 6
// (error 1.2e-8 there).
inline vfloat exp_nonpositive(vfloat x) {
  const vfloat magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  x = vmax(splat(-87.f), x);  // in this order NaN stays NaN
  const vfloat shifted = x * 1.44269504f + magic;
  const vfloat r = x * 1.44269504f - (shifted - magic);
  vfloat p = splat(1.5403530e-4f);
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.f;
  const vint exponent = ((vint)shifted) << 23;  // the shift drops the magic number's own bits
  return (vfloat)((vint)p + exponent);
}

// log(x) for positive normal x, error below 1e-7 + 1e-7 |log x|. x = 2^n m with m in [sqrt 1/2, sqrt 2); log
// m from the series of atanh: log m = 2 (s + s^3/3 + s^5/5 + ...), s = (m - 1) / (m + 1), |s| < 0.172; the
// first omitted term is below 1e-9.
inline vfloat log_positive(vfloat x) {
  const vint bits = (vint)x - splat_int(0x3f3504f3);  // bits of sqrt(1/2)
  const vint exponent = bits >> 23;
  const vfloat m = (vfloat)((vint)x - (exponent << 23));
  const vfloat s = (m - 1.f) / (m + 1.f), t = s * s;
  vfloat p = splat(2.f / 9.f);
  p = p * t + 2.f / 7.f;
  p = p * t + 2.f / 5.f;
  p = p * t + 2.f / 3.f;
  return __builtin_convertvector(exponent, vfloat) * 0.69314718f + (p * t * s + 2.f * s);
}

// Interpolation along one axis with align_corners: output i reads inputs low[i] and low[i] + 1 with weights
// 1 - frac, frac. low is at most in - 2, so that low + 1 exists (frac is 1 at the end); a single input has
// low 0 and frac 0 everywhere.
struct Axis {
  std::vector<int32_t> low;
  std::vector<float> frac;
  std::vector<int64_t> begin;  // outputs of cell i: begin[i] .. begin[i + 1]; there are max(in - 1, 1) cells

  Axis(int64_t in, int64_t out) : low(out), frac(out), begin(std::max<int64_t>(in - 1, 1) + 1, out) {
    const float scale = out > 1 ? static_cast<float>(in - 1) / static_cast<float>(out - 1) : 0.f;
    int64_t cell = 0;
    begin[0] = 0;
    for (int64_t i = 0; i < out; ++i) {
      const float position = scale * static_cast<float>(i);
      low[i] = static_cast<int32_t>(
          std::max<int64_t>(std::min<int64_t>(static_cast<int64_t>(position), in - 2), 0));
      frac[i] = in > 1 ? std::min(position - static_cast<float>(low[i]), 1.f) : 0.f;
      while (cell < low[i]) begin[++cell] = i;
    }
  }
  int64_t cells() const { return static_cast<int64_t>(begin.size()) - 1; }
};

// Sixteen neighbouring outputs of an axis, and their interpolation weights.
struct Block {
  vint index;      // low - base
  vfloat frac, rest;  // weights of low + 1 and of low
  int32_t base;    // first input read
  int32_t lanes;   // number of existing outputs; further lanes repeat the last one
  bool narrow;     // all inputs are within base .. base + 15: one load and two permutations suffice
  vfloat weights[kLanes];  // if narrow: weights[output][input - base], two nonzero per output

  Block(const Axis& axis, int64_t first) {
    const int64_t out = static_cast<int64_t>(axis.low.size());
    base = axis.low[first];
    lanes = static_cast<int32_t>(std::min<int64_t>(kLanes, out - first));
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = std::min(first + lane, out - 1);
      index[lane] = axis.low[i] - base;
      frac[lane] = axis.frac[i];
    }
    rest = 1.f - frac;
    narrow = index[kLanes - 1] + 1 < kLanes;
    for (int lane = 0; narrow && lane < kLanes; ++lane) {
      weights[lane] = vfloat{};
      weights[lane][index[lane]] = rest[lane];
      weights[lane][index[lane] + 1] = frac[lane];
    }
  }

  // Interpolates one row of inputs at the sixteen outputs; the row must be readable kLanes past its end.
  vfloat interpolate(const float* row) const {
    if (narrow) {
      const vfloat window = load(row + base);
      return rest * permute(window, index) + frac * permute(window, index + 1);
    }
    vfloat out;
    for (int lane = 0; lane < kLanes; ++lane) {
      const float* at = row + base + index[lane];
      out[lane] = rest[lane] * at[0] + frac[lane] * at[1];
    }
    return out;
  }

  // Adjoint of interpolate: adds the gradients of the sixteen outputs to the inputs they read.
  void spread(vfloat outputs, float* row) const {
    const float* output = reinterpret_cast<const float*>(&outputs);
    float* at = row + base;
    if (narrow) {
      vfloat even = load(at), odd{};
      for (int i = 0; i < kLanes; i += 2) {
        even += weights[i] * output[i];
        odd += weights[i + 1] * output[i + 1];
      }
      store(at, even + odd);
      return;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      at[index[lane]] += rest[lane] * output[lane];
      at[index[lane] + 1] += frac[lane] * output[lane];
    }
  }
};

inline std::vector<Block> blocks_of(const Axis& axis) {
  std::vector<Block> blocks;
  for (size_t first = 0; first < axis.low.size(); first += kLanes) blocks.emplace_back(axis, first);
  return blocks;
}

// Runs task(0, scratch) .. task(count - 1, scratch), each once, on all threads; a free thread takes the next
// task. Each thread has one Scratch(problem) for all its tasks.
template <typename Scratch, typename Problem, typename Task>
void run_tasks(int64_t count, const Problem& problem, const Task& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), count), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(problem);
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = next++; i < count; i = next++) task(i, scratch);
  });
}

}  // namespace stpp
