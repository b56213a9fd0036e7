// Rows of a low-resolution map as fp32 planes, and their bilinear resizing (align_corners=True). Shared by
// the operators that process full resolution one row at a time: argmax and softmax_accumulate.
//
// A "plane row" is one image row of all C channels, laid out [C][stride] in fp32, with pixels contiguous.
// Arithmetic runs over pixels, so C may have any value and softmax needs no reduction inside a vector.
// Resizing is separable: a source row is resized along its width once, when it enters the cache, and output
// rows between two source rows then cost one contiguous blend. The order (width first, then height) and the
// fp32 index arithmetic are those of PyTorch's CPU interpolate, so both select the same source pixels.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <limits>

#include "lanes.h"

namespace stpp {
namespace rows {

// fp32 scratch memory, aligned to a cache line, with slack for vectors read past the end.
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : memory_(c10::GetCPUAllocator()->allocate((count + 2 * kLanes) * sizeof(float))) {
    std::memset(memory_.get(), 0, (count + 2 * kLanes) * sizeof(float));
  }
  float* data() const { return static_cast<float*>(memory_.get()); }

 private:
  at::DataPtr memory_;
};

// Distance between the planes of a row: an odd number of cache lines, or planes of width 1024 would all fall
// into the same cache set.
inline int64_t plane_stride(int64_t width) {
  const int64_t lines = (width + 15) / 16;
  return (lines | 1) * 16;
}

// Weights of out[i] = left[i] * in[first[i]] + right[i] * in[first[i] + 1]; if right[i] is 0, `first` may be
// the last index.
struct Taps {
  std::vector<int32_t> first;
  std::vector<float> left, right;
};

inline Taps make_taps(int64_t in, int64_t out, bool mirrored) {
  Taps taps;
  const float scale = out > 1 ? static_cast<float>(in - 1) / (out - 1) : 0.0f;
  for (int64_t i = 0; i < out; ++i) {
    const float position = scale * i;
    const int64_t index = std::min<int64_t>(static_cast<int64_t>(position), in - 1);
    float right = std::min(std::max(position - index, 0.0f), 1.0f), left = 1.0f - right;
    int64_t first = index;
    if (index == in - 1) {
      left = 1.0f, right = 0.0f;
    }
    if (mirrored) {  // the same two pixels, read from the other end
      first = right == 0.0f ? in - 1 - index : in - 2 - index;
      if (right != 0.0f) std::swap(left, right);
    }
    taps.first.push_back(static_cast<int32_t>(first));
    taps.left.push_back(left);
    taps.right.push_back(right);
  }
  return taps;
}

// Resizes rows along their width.
class Columns {
 public:
  Columns(int64_t in, int64_t out, bool mirrored) : out_(out), copy_(in == out && !mirrored) {
    const Taps taps = make_taps(in, out, mirrored);
    const int64_t padded = (out + kLanes - 1) / kLanes * kLanes;
    base_.resize(padded / kLanes), near_.resize(padded / kLanes);
    a_.resize(padded), b_.resize(padded), left_.resize(padded), right_.resize(padded);
    for (int64_t chunk = 0; chunk * kLanes < padded; ++chunk) {
      int32_t low = INT32_MAX, high = 0;
      for (int64_t i = chunk * kLanes; i < (chunk + 1) * kLanes; ++i) {
        const int64_t from = std::min(i, out - 1);
        a_[i] = taps.first[from];
        b_[i] = a_[i] + (taps.right[from] != 0.0f ? 1 : 0);
        left_[i] = taps.left[from], right_[i] = taps.right[from];
        low = std::min(low, a_[i]), high = std::max(high, b_[i]);
      }
      base_[chunk] = low;
      near_[chunk] = high - low < 2 * kLanes;
      for (int64_t i = chunk * kLanes; i < (chunk + 1) * kLanes; ++i) a_[i] -= low, b_[i] -= low;
    }
  }

  int64_t out() const { return out_; }
  bool copies() const { return copy_; }

  // Values of output pixels [chunk * kLanes, (chunk + 1) * kLanes) of one plane; src is readable 2 * kLanes
  // past its end.
  vfloat get(const float* src, int64_t chunk) const {
    const float* window = src + base_[chunk];
    const vint ia = load(&a_[chunk * kLanes]), ib = load(&b_[chunk * kLanes]);
    const vfloat wa = load(&left_[chunk * kLanes]), wb = load(&right_[chunk * kLanes]);
    // Neighbouring outputs read neighbouring inputs: two loads and two permutations replace 32 gathers.
    if (near_[chunk]) {
      const vfloat low = load(window), high = load(window + kLanes);
      return wa * permute(low, high, ia) + wb * permute(low, high, ib);
    }
    return wa * gather(window, ia) + wb * gather(window, ib);
  }

  // Resizes src to dst[0, out); dst is writable to a whole number of vectors.
  void resize(const float* src, float* dst) const {
    for (int64_t chunk = 0; chunk * kLanes < out_; ++chunk) store(dst + chunk * kLanes, get(src, chunk));
  }

 private:
  int64_t out_;
  bool copy_;
  std::vector<int32_t> base_, a_, b_;
  std::vector<char> near_;
  std::vector<float> left_, right_;
};

// Map [N, C, h, w] of any strides, in fp32, bf16 or fp16.
struct Map {
  const void* data;
  at::ScalarType dtype;
  int64_t channels, height, width, stride_n, stride_c, stride_h, stride_w;

  explicit Map(const at::Tensor& t)
      : data(t.const_data_ptr()), dtype(t.scalar_type()), channels(t.size(1)), height(t.size(2)),
        width(t.size(3)), stride_n(t.stride(0)), stride_c(t.stride(1)), stride_h(t.stride(2)),
        stride_w(t.stride(3)) {}

  // Writes row y of image n as planes into dst.
  void read(int64_t n, int64_t y, float* dst, int64_t stride) const {
    const int64_t at_row = n * stride_n + y * stride_h;
    if (dtype == at::kFloat) {
      read_as(static_cast<const float*>(data) + at_row, dst, stride);
    } else if (dtype == at::kBFloat16) {
      read_as(static_cast<const at::BFloat16*>(data) + at_row, dst, stride);
    } else {
      read_as(static_cast<const at::Half*>(data) + at_row, dst, stride);
    }
  }

 private:
  template <typename T>
  void read_as(const T* row, float* dst, int64_t stride) const {
    if (stride_w == 1) {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t x = 0; x < width; ++x) dst[c * stride + x] = static_cast<float>(row[c * stride_c + x]);
    } else {
      for (int64_t x = 0; x < width; ++x)
        for (int64_t c = 0; c < channels; ++c)
          dst[c * stride + x] = static_cast<float>(row[x * stride_w + c * stride_c]);
    }
  }
};

// Cache of the last two rows requested, resized along their width by `columns`. Rows y and y + 1 never
// displace each other.
class RowCache {
 public:
  RowCache(const Map& map, const Columns& columns)
      : map_(map), columns_(columns), raw_stride_(plane_stride(map.width)),
        stride_(plane_stride(columns.out())), raw_(map.channels * raw_stride_), even_(map.channels * stride_),
        odd_(map.channels * stride_) {}

  int64_t stride() const { return stride_; }

  // Never inlined: copies of it may contract products and sums differently, and a row would differ in its last
  // bits between the first row of a task and later ones.
  [[gnu::noinline]] const float* get(int64_t n, int64_t y) {
    float* planes = (y & 1 ? odd_ : even_).data();
    const int64_t key = n * map_.height + y;
    if (held_[y & 1] == key) return planes;
    held_[y & 1] = key;
    if (columns_.copies()) {
      map_.read(n, y, planes, stride_);
      return planes;
    }
    map_.read(n, y, raw_.data(), raw_stride_);
    for (int64_t c = 0; c < map_.channels; ++c)
      columns_.resize(raw_.data() + c * raw_stride_, planes + c * stride_);
    return planes;
  }

 private:
  const Map& map_;
  const Columns& columns_;
  int64_t raw_stride_, stride_;
  Scratch raw_, even_, odd_;
  int64_t held_[2] = {-1, -1};
};

}  // namespace rows
}  // namespace stpp
