// Sizes of a depthwise convolution, and rows of its maps as padded fp32 planes.
#pragma once

#include "lanes.h"
#include "rows.h"

namespace stpp {
namespace depthwise {

// Map [N, H, W, C] in memory.
template <typename T>
struct Map {
  T* data;
  int64_t height, width, channels;
  T* at(int64_t image, int64_t row, int64_t block) const {
    return data + (image * height + row) * width * channels + block * kLanes;
  }
  int64_t lanes(int64_t block) const { return std::min(kLanes, channels - block * kLanes); }
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Geometry {
  int64_t images, channels, height, width, kernel, stride, dilation, top, left;
  int64_t rows, columns;  // of the output

  int64_t blocks() const { return divide_up(channels, kLanes); }
  int64_t taps() const { return kernel * kernel; }
  int64_t span() const { return (kernel - 1) * dilation; }  // from the first tap to the last
  // Columns of zeros before and after a row of the input, and of the output's gradient.
  int64_t before_input() const { return left; }
  int64_t after_input() const {
    return std::max<int64_t>(0, (columns - 1) * stride + span() - left - (width - 1));
  }
  int64_t before_output() const { return std::max<int64_t>(0, divide_up(span() - left, stride)); }
  int64_t after_output() const { return std::max<int64_t>(0, (width - 1 + left) / stride - (columns - 1)); }
  int64_t input_rows() const { return span() + 1; }  // needed simultaneously
  int64_t output_rows() const { return span() / stride + 1; }
};

// Cache of a map's rows as planes; holds the last `capacity` rows requested.
class Planes {
 public:
  Planes(int64_t width, int64_t before, int64_t after, int64_t capacity, int64_t blocks)
      : stride_(plane(width, before, after)), before_(before), capacity_(capacity), row_(blocks * stride_),
        memory_(capacity * row_), held_(capacity, -1) {}

  // Floats of one block of one row: an odd number of cache lines, or blocks would share a few cache sets.
  static int64_t plane(int64_t width, int64_t before, int64_t after) {
    return ((before + width + after) | 1) * kLanes;
  }
  int64_t stride() const { return stride_; }

  // Clears the cache, for another image or other blocks.
  void forget() { std::fill(held_.begin(), held_.end(), -1); }

  // Returns column 0 of row `row`, of blocks first .. first + count, with zeros before and after the row.
  template <typename T>
  const float* get(const Map<const T>& map, int64_t image, int64_t row, int64_t first, int64_t count) {
    float* planes = memory_.data() + row % capacity_ * row_ + before_ * kLanes;
    if (held_[row % capacity_] == row) return planes;
    held_[row % capacity_] = row;
    const T* source = map.at(image, row, first);
    const int64_t channels = map.channels, width = map.width, stride = stride_;
    const int64_t rest = channels - first * kLanes, whole = std::min(count, rest / kLanes);
    for (int64_t x = 0; x < width; ++x) {
      const T* from = source + x * channels;
      float* into = planes + x * kLanes;
      for (int64_t block = 0; block < whole; ++block, from += kLanes, into += stride)
        store(into, load_lanes(from));
    }
    for (int64_t x = 0; whole < count && x < width; ++x)
      store(planes + whole * stride + x * kLanes,
            load_part(source + x * channels + whole * kLanes, rest % kLanes));
    return planes;
  }

 private:
  int64_t stride_, before_, capacity_, row_;
  rows::Scratch memory_;
  std::vector<int64_t> held_;
};

}  // namespace depthwise
}  // namespace stpp
