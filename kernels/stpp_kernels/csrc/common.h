// Shared by the C++ operators: 16-lane vectors, exp and log, the interpolation grid, typed loads and stores, task loop.
//
// Vectors use the GCC/Clang extension, so one source serves AVX-512, AVX2 and NEON; only the lane permutation has a
// special form. Shape suffixes as in reference.py: C classes, h w low-resolution size, H W full size.
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

constexpr int kLanes = 16;
typedef float vfloat __attribute__((vector_size(64)));
typedef float vfloat_unaligned __attribute__((vector_size(64), aligned(4)));
typedef int32_t vint __attribute__((vector_size(64)));

inline vfloat splat(float value) { return value - vfloat{}; }
inline vint splat_int(int32_t value) { return value - vint{}; }
inline vfloat load(const float* source) { return *reinterpret_cast<const vfloat_unaligned*>(source); }
inline void store(float* target, vfloat value) { *reinterpret_cast<vfloat_unaligned*>(target) = value; }

inline vfloat vmax(vfloat a, vfloat b) {
#ifdef __AVX512F__
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

inline float sum_lanes(vfloat value) {
  float total = 0.f;
  for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
  return total;
}

// table[index[lane]] for every lane; indices in 0..15.
inline vfloat permute(vfloat table, vint index) {
#ifdef __AVX512F__
  return (vfloat)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#else
  vfloat out;
  for (int lane = 0; lane < kLanes; ++lane) out[lane] = table[index[lane]];
  return out;
#endif
}

// exp(x) for x <= 0 (softmax after its maximum is taken off); relative error about 2e-7; below -87 it stays at exp(-87).
// exp(x) = 2^n 2^r with n = round(x log2 e) and r in [-1/2, 1/2]; 2^r by the Taylor polynomial of degree 6 (error 1.2e-8 there).
inline vfloat exp_nonpositive(vfloat x) {
  const vfloat magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low mantissa bits
  x = vmax(x, splat(-87.f));
  const vfloat shifted = x * 1.44269504f + magic;
  const vfloat r = x * 1.44269504f - (shifted - magic);
  vfloat p = splat(1.5403530e-4f);
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.f;
  const vint exponent = ((vint)shifted) << 23;  // the magic number's own bits leave at the top
  return (vfloat)((vint)p + exponent);
}

// Interpolation along one axis with align_corners: output i reads inputs low[i] and low[i] + 1 with weights 1 - frac, frac.
// low is at most in - 2, so that low + 1 exists (frac is 1 at the end); a single input has low 0 and frac 0 everywhere.
struct Axis {
  std::vector<int32_t> low;
  std::vector<float> frac;
  std::vector<int64_t> begin;  // outputs of cell i are begin[i] .. begin[i + 1]; there are max(in - 1, 1) cells

  Axis(int64_t in, int64_t out) : low(out), frac(out), begin(std::max<int64_t>(in - 1, 1) + 1, out) {
    const float scale = out > 1 ? static_cast<float>(in - 1) / static_cast<float>(out - 1) : 0.f;
    int64_t cell = 0;
    begin[0] = 0;
    for (int64_t i = 0; i < out; ++i) {
      const float position = scale * static_cast<float>(i);
      low[i] = static_cast<int32_t>(std::max<int64_t>(std::min<int64_t>(static_cast<int64_t>(position), in - 2), 0));
      frac[i] = in > 1 ? std::min(position - static_cast<float>(low[i]), 1.f) : 0.f;
      while (cell < low[i]) begin[++cell] = i;
    }
  }
  int64_t cells() const { return static_cast<int64_t>(begin.size()) - 1; }
};

// Sixteen neighbouring outputs of an axis, and how they read its inputs.
struct Block {
  vint index;      // low - base
  vfloat frac, rest;  // weights of low + 1 and of low
  int32_t base;    // first input read
  int32_t lanes;   // outputs that exist; the others repeat the last one
  bool narrow;     // all inputs read lie within base .. base + 15, so that one load and two permutations serve

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
  }

  // Interpolates one row of inputs at the sixteen outputs. The row must be readable up to base + 15.
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
};

inline std::vector<Block> blocks_of(const Axis& axis) {
  std::vector<Block> blocks;
  for (size_t first = 0; first < axis.low.size(); first += kLanes) blocks.emplace_back(axis, first);
  return blocks;
}

// Length of a scratch row of `width` inputs: interpolate() may read kLanes past any of them.
inline int64_t padded(int64_t width) { return width + kLanes; }

// Copies [C, width] of one image row, any strides and dtype, to float rows of padded(width); the padding becomes 0.
template <typename T>
void load_row(const T* source, int64_t channels, int64_t width, int64_t stride_c, int64_t stride_x, float* target) {
  const int64_t pitch = padded(width);
  if (stride_c == 1 && stride_x != 1) {
    for (int64_t x = 0; x < width; ++x)
      for (int64_t c = 0; c < channels; ++c) target[c * pitch + x] = static_cast<float>(source[x * stride_x + c]);
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t x = 0; x < width; ++x)
        target[c * pitch + x] = static_cast<float>(source[c * stride_c + x * stride_x]);
  }
  for (int64_t c = 0; c < channels; ++c) std::memset(target + c * pitch + width, 0, kLanes * sizeof(float));
}

// load_row of row y of image n of a [N, C, h, w] tensor of float32, bfloat16 or float16.
inline void load_row(const at::Tensor& maps, int64_t n, int64_t y, float* target) {
  const int64_t offset = n * maps.stride(0) + y * maps.stride(2);
  const int64_t channels = maps.size(1), width = maps.size(3), sc = maps.stride(1), sx = maps.stride(3);
  switch (maps.scalar_type()) {
    case at::kFloat: return load_row(maps.const_data_ptr<float>() + offset, channels, width, sc, sx, target);
    case at::kBFloat16: return load_row(maps.const_data_ptr<at::BFloat16>() + offset, channels, width, sc, sx, target);
    case at::kHalf: return load_row(maps.const_data_ptr<at::Half>() + offset, channels, width, sc, sx, target);
    default: TORCH_CHECK_TYPE(false, "expected float32, bfloat16 or float16, got ", maps.scalar_type());
  }
}

// Runs task(0) .. task(count - 1), each once, on all threads; a thread takes the next as it becomes free.
template <typename Task>
void run_tasks(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

}  // namespace stpp
