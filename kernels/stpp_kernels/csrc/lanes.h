// Loads and stores of sixteen fp32, bf16 or fp16 values as one vector of fp32; tensors of these types.
#pragma once

#include <algorithm>

#include "common.h"

namespace stpp {

typedef uint16_t vhalf __attribute__((vector_size(32)));
typedef uint32_t vuint __attribute__((vector_size(64)));

inline vfloat load_lanes(const float* source) { return load(source); }
inline vfloat load_lanes(const at::BFloat16* source) {
#ifdef __AVX512F__
  const vuint wide = (vuint)_mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256((const __m256i*)source));
#else
  vhalf half;
  std::memcpy(&half, source, sizeof(half));
  const vuint wide = __builtin_convertvector(half, vuint);
#endif
  return (vfloat)(wide << 16);
}
inline vfloat load_lanes(const at::Half* source) {
  vfloat value;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = static_cast<float>(source[lane]);
  return value;
}

inline void store_lanes(float* target, vfloat value) { store(target, value); }
inline void store_lanes(at::BFloat16* target, vfloat value) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256((__m256i*)target, (__m256i)_mm512_cvtneps_pbh((__m512)value));
#else
  const vuint bits = (vuint)value, rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  const vuint number = (vuint)(value == value);                                   // all ones, or 0 for NaN
  const vhalf half = __builtin_convertvector((rounded >> 16 & number) | (0x7fc0 & ~number), vhalf);
  std::memcpy(target, &half, sizeof(half));
#endif
}
inline void store_lanes(at::Half* target, vfloat value) {
  for (int lane = 0; lane < kLanes; ++lane) target[lane] = static_cast<at::Half>(value[lane]);
}

// Loads the first `lanes` (1..16) values; the others are zero.
template <typename T>
vfloat load_part(const T* source, int64_t lanes) {
  if (lanes >= kLanes) return load_lanes(source);
  T whole[kLanes] = {};
  std::copy_n(source, lanes, whole);
  return load_lanes(whole);
}

template <typename T>
void store_part(T* target, vfloat value, int64_t lanes) {
  if (lanes >= kLanes) return store_lanes(target, value);
  T whole[kLanes];
  store_lanes(whole, value);
  std::copy_n(whole, lanes, target);
}

// Calls `body` with a value of the tensor's type.
template <typename Body>
void with_type(const at::Tensor& t, const Body& body) {
  if (t.scalar_type() == at::kFloat) return body(float{});
  if (t.scalar_type() == at::kBFloat16) return body(at::BFloat16{});
  TORCH_CHECK_VALUE(t.scalar_type() == at::kHalf, "expected float32, bfloat16 or float16, got ", t.scalar_type());
  body(at::Half{});
}

inline at::Tensor channels_last(const at::Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

}  // namespace stpp
