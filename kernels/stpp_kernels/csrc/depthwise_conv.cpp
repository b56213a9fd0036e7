// The backward pass of depthwise_conv on the CPU. Derivation: depthwise_conv.py.
//
// Channels are taken in blocks of 16, one vector of fp32; a task is some rows of some images, for a chunk of blocks. It walks
// down the rows and keeps the last few of both maps as fp32 planes [block][column][16], between columns of zeros that stand for
// the padding: so a row is widened once, no tap needs a test for the border, and all that the inner loops touch is contiguous
// and lies in the second-level cache. These loops are two:
//   - gather: eight neighbouring input gradients, added up over the taps that reach them;
//   - add_products: one row of taps of the weight gradient, added up over a row of outputs.
// Each task has sums of the weight gradient to itself, which are added in the order of the tasks; tasks follow from the shape
// alone, so results do not depend on the number of threads.
#include <torch/library.h>

#include "lanes.h"
#include "rows.h"

namespace stpp {
namespace {

constexpr int64_t kTasks = 64;          // about as many are made; by shape alone
constexpr int64_t kPlanes = 256 << 10;  // bytes of planes that a chunk of channels should not exceed
constexpr int64_t kLeastRows = 8;       // of a band: a smaller one reads more rows of its neighbours than of its own
constexpr int kOutputs = 8;             // neighbours that `gather` sums up at once

// A map [N, H, W, C] in memory.
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
  int64_t images, channels, height, width, kernel, stride, dilation, top, left, rows, columns;  // rows, columns: outputs

  int64_t blocks() const { return divide_up(channels, kLanes); }
  int64_t taps() const { return kernel * kernel; }
  int64_t span() const { return (kernel - 1) * dilation; }  // from the first tap to the last
  // Columns of zeros before and after a row of the input, and of the output's gradient.
  int64_t before_input() const { return left; }
  int64_t after_input() const { return std::max<int64_t>(0, (columns - 1) * stride + span() - left - (width - 1)); }
  int64_t before_output() const { return std::max<int64_t>(0, divide_up(span() - left, stride)); }
  int64_t after_output() const { return std::max<int64_t>(0, (width - 1 + left) / stride - (columns - 1)); }
  int64_t input_rows() const { return span() + 1; }  // that are needed at once
  int64_t output_rows() const { return span() / stride + 1; }
};

// Rows of a map as planes, the last `capacity` of those asked for.
class Planes {
 public:
  Planes(int64_t width, int64_t before, int64_t after, int64_t capacity, int64_t blocks)
      : stride_(plane(width, before, after)), before_(before), capacity_(capacity), row_(blocks * stride_),
        memory_(capacity * row_), held_(capacity, -1) {}

  // Floats of one block of one row: an odd number of cache lines, or blocks would share a few sets of the cache.
  static int64_t plane(int64_t width, int64_t before, int64_t after) { return ((before + width + after) | 1) * kLanes; }
  int64_t stride() const { return stride_; }

  // Begins another image or other blocks.
  void forget() { std::fill(held_.begin(), held_.end(), -1); }

  // Column 0 of row `row`, of blocks first .. first + count; zeros lie before and after the row.
  template <typename T>
  const float* get(const Map<const T>& map, int64_t image, int64_t row, int64_t first, int64_t count) {
    float* planes = memory_.data() + row % capacity_ * row_ + before_ * kLanes;
    if (held_[row % capacity_] == row) return planes;
    held_[row % capacity_] = row;
    const T* source = map.at(image, row, first);
    const int64_t rest = map.channels - first * kLanes;
    for (int64_t x = 0; x < map.width; ++x, source += map.channels)
      for (int64_t block = 0; block < count; ++block)
        store(planes + block * stride_ + x * kLanes, load_part(source + block * kLanes, rest - block * kLanes));
    return planes;
  }

 private:
  int64_t stride_, before_, capacity_, row_;
  rows::Scratch memory_;
  std::vector<int64_t> held_;
};

// Cuts the work: chunks of blocks, and for each of them groups of images or, where there are few, bands of rows.
struct Plan {
  int64_t chunk, chunks, bands, group, groups;  // chunk: blocks; group: images

  Plan(const Geometry& g, int64_t bytes_per_block) {
    const int64_t blocks = g.blocks(), fitting = std::max<int64_t>(2, kPlanes / bytes_per_block);
    chunk = divide_up(blocks, divide_up(blocks, fitting));
    chunk = std::min(blocks, chunk + chunk % 2);  // pairs: whole cache lines of 16-bit values
    chunks = divide_up(blocks, chunk);
    const int64_t singles = g.images * chunks;
    bands = std::max<int64_t>(1, std::min(kTasks / singles, g.rows / kLeastRows));
    group = std::max<int64_t>(1, singles / kTasks);
    groups = divide_up(g.images, group);
  }
  int64_t slots() const { return groups * bands; }  // tasks that share a chunk
  int64_t tasks() const { return chunks * slots(); }
};

struct Tap {
  const float *source, *weight;
};

// out(j, sum) of kCount neighbours from j on: the sum over the taps of source[j] * weight.
template <int kCount, typename Out>
inline void gather_some(const Tap* taps, int64_t num_taps, int64_t j, const Out& out) {
  vfloat sum[kCount] = {};
  for (int64_t t = 0; t < num_taps; ++t) {
    const vfloat weight = load(taps[t].weight);
    const float* source = taps[t].source + j * kLanes;
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) sum[i] += load(source + i * kLanes) * weight;
  }
  for (int i = 0; i < kCount; ++i) out(j + i, sum[i]);
}

template <typename Out>
void gather(const Tap* taps, int64_t num_taps, int64_t count, const Out& out) {
  if (count < kOutputs) {
    for (int64_t j = 0; j < count; ++j) gather_some<1>(taps, num_taps, j, out);
  } else {  // the last eight may overlap the eight before: the same sums once more
    for (int64_t j = 0; j < count; j += kOutputs)
      gather_some<kOutputs>(taps, num_taps, std::min(j, count - kOutputs), out);
  }
}

// Adds to sums[block][k] the products of a row of gradients with the inputs that tap k reads for them.
template <int kTaps, int kBlocks>
void add_products(const float* grad, int64_t grad_stride, const float* source, int64_t source_stride, int64_t columns,
                  int64_t step, int64_t dilation, float* sums, int64_t sums_stride) {
  vfloat sum[kBlocks][kTaps] = {};
  for (int64_t x = 0; x < columns; ++x) {
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
      const vfloat value = load(grad + b * grad_stride + x * kLanes);
      const float* read = source + b * source_stride + x * step * kLanes;
#pragma GCC unroll 5
      for (int k = 0; k < kTaps; ++k) sum[b][k] += value * load(read + k * dilation * kLanes);
    }
  }
  for (int b = 0; b < kBlocks; ++b) {
    for (int k = 0; k < kTaps; ++k) {
      float* at = sums + b * sums_stride + k * kLanes;
      store(at, load(at) + sum[b][k]);
    }
  }
}

template <typename T>
struct Problem {
  const Geometry g;
  const Plan plan;
  const Map<const T> input, grad;
  const Map<T> grad_input;  // without data where it is not needed
  const float* weights;     // [block][tap][16]
  float* sums;              // of the weight gradient, [slot][block][tap][16]; null where it is not needed
};

// What a task covers: images, rows of outputs, blocks of channels.
struct Part {
  int64_t first_image, last_image, first_row, last_row, block, count, slot;

  Part(const Geometry& g, const Plan& plan, int64_t task) {
    const int64_t chunk = task % plan.chunks, band = task / plan.chunks % plan.bands;
    slot = task / plan.chunks;
    first_image = slot / plan.bands * plan.group, last_image = std::min(g.images, first_image + plan.group);
    first_row = g.rows * band / plan.bands, last_row = g.rows * (band + 1) / plan.bands;
    block = chunk * plan.chunk, count = std::min(plan.chunk, g.blocks() - block);
  }
};

template <typename T>
class Worker {
 public:
  explicit Worker(const Problem<T>& p)
      : p_(p), g_(p.g),
        input_(g_.width, g_.before_input(), g_.after_input(), p.sums ? g_.input_rows() : 0, p.plan.chunk),
        grad_(g_.columns, g_.before_output(), g_.after_output(), g_.output_rows(), p.plan.chunk) {}

  void backward(const Part& part) {
    for (int64_t image = part.first_image; image < part.last_image; ++image) {
      input_.forget(), grad_.forget();
      for (int64_t row = part.first_row; row < part.last_row; ++row) {
        if (p_.sums) weight_gradient_row(part, image, row);
        if (!p_.grad_input.data) continue;
        const auto reached = [&](int64_t first) { return std::clamp<int64_t>(first * g_.stride - g_.top, 0, g_.height); };
        const int64_t end = row + 1 == g_.rows ? g_.height : reached(row + 1);
        for (int64_t y = reached(row); y < end; ++y) input_gradient_row(part, image, y);
      }
    }
  }

 private:
  const float* input_row(const Part& part, int64_t image, int64_t row) {
    return input_.get(p_.input, image, row, part.block, part.count);
  }
  const float* grad_row(const Part& part, int64_t image, int64_t row) {
    return grad_.get(p_.grad, image, row, part.block, part.count);
  }
  const float* weight(int64_t block, int64_t tap) const { return p_.weights + (block * g_.taps() + tap) * kLanes; }

  // Input y has the taps ky with y + top - ky dilation = stride * row of the output, and likewise along x: columns whose x + left
  // leave the same remainder have the same taps, and read neighbouring outputs.
  void input_gradient_row(const Part& part, int64_t image, int64_t y) {
    for (int64_t remainder = 0; remainder < g_.stride; ++remainder) {
      const int64_t x = ((remainder - g_.left) % g_.stride + g_.stride) % g_.stride;
      if (x >= g_.width) continue;
      taps_.clear();
      for (int64_t ky = 0; ky < g_.kernel; ++ky) {
        const int64_t at = y + g_.top - ky * g_.dilation;
        if (at < 0 || at % g_.stride != 0 || at / g_.stride >= g_.rows) continue;
        const float* source = grad_row(part, image, at / g_.stride);
        for (int64_t kx = 0; kx < g_.kernel; ++kx) {
          const int64_t from = x + g_.left - kx * g_.dilation;
          if (from % g_.stride != 0) continue;
          taps_.push_back({source + from / g_.stride * kLanes, weight(part.block, ky * g_.kernel + kx)});
        }
      }
      gather_row(part, divide_up(g_.width - x, g_.stride), p_.grad_input.at(image, y, part.block) + x * g_.channels,
                 g_.stride * g_.channels);
    }
  }

  // The collected taps, for all blocks of the part; neighbours of the result lie `apart` values apart.
  void gather_row(const Part& part, int64_t count, T* target, int64_t apart) {
    for (int64_t block = part.block; block < part.block + part.count; ++block, target += kLanes) {
      const int64_t lanes = p_.grad_input.lanes(block);
      gather(taps_.data(), static_cast<int64_t>(taps_.size()), count,
             [=](int64_t j, vfloat sum) { store_part(target + j * apart, sum, lanes); });
      for (Tap& tap : taps_) tap.source += grad_.stride(), tap.weight += g_.taps() * kLanes;
    }
  }

  void weight_gradient_row(const Part& part, int64_t image, int64_t row) {
    const float* grad = grad_row(part, image, row);
    float* sums = p_.sums + (part.slot * g_.blocks() + part.block) * g_.taps() * kLanes;
    for (int64_t ky = 0; ky < g_.kernel; ++ky) {
      const int64_t y = row * g_.stride - g_.top + ky * g_.dilation;
      if (y < 0 || y >= g_.height) continue;
      const float* source = input_row(part, image, y);
      for (int64_t kx = 0; kx < g_.kernel;) {
        const int64_t left = g_.kernel - kx;
        const float* from = source + (kx * g_.dilation - g_.left) * kLanes;
        float* into = sums + (ky * g_.kernel + kx) * kLanes;
        if (left >= 5) {
          add_taps<5>(part, grad, from, into), kx += 5;
        } else if (left >= 3) {
          add_taps<3>(part, grad, from, into), kx += 3;
        } else {
          add_taps<1>(part, grad, from, into), kx += 1;
        }
      }
    }
  }

  template <int kTaps>
  void add_taps(const Part& part, const float* grad, const float* source, float* sums) {
    const int64_t next = g_.taps() * kLanes;
    for (int64_t b = 0; b < part.count; b += 2) {
      const auto add = b + 1 < part.count ? add_products<kTaps, 2> : add_products<kTaps, 1>;
      add(grad + b * grad_.stride(), grad_.stride(), source + b * input_.stride(), input_.stride(), g_.columns, g_.stride,
          g_.dilation, sums + b * next, next);
    }
  }

  const Problem<T>& p_;
  const Geometry& g_;
  Planes input_, grad_;
  std::vector<Tap> taps_;
};

Geometry geometry_of(const at::Tensor& x, const at::Tensor& weight, int64_t stride, int64_t dilation, at::IntArrayRef padding) {
  Geometry g{x.size(0), x.size(1), x.size(2), x.size(3), weight.size(2), stride, dilation, padding[2], padding[0], 0, 0};
  g.rows = (g.height + padding[2] + padding[3] - g.span() - 1) / stride + 1;
  g.columns = (g.width + padding[0] + padding[1] - g.span() - 1) / stride + 1;
  return g;
}

// The weights [C, 1, K, K] as [block][tap][16].
rows::Scratch blocked(const at::Tensor& weight, const Geometry& g) {
  const at::Tensor plain = weight.to(at::kFloat).contiguous();
  const float* source = plain.const_data_ptr<float>();
  rows::Scratch weights(g.blocks() * g.taps() * kLanes);
  for (int64_t c = 0; c < g.channels; ++c)
    for (int64_t tap = 0; tap < g.taps(); ++tap)
      weights.data()[(c / kLanes * g.taps() + tap) * kLanes + c % kLanes] = source[c * g.taps() + tap];
  return weights;
}

// Adds the sums of all slots, in their order.
void add_slots(const float* sums, int64_t slots, const Geometry& g, const at::Tensor& grad_weight) {
  const int64_t size = g.blocks() * g.taps() * kLanes;
  at::Tensor total = at::empty({g.channels, g.taps()}, grad_weight.options().dtype(at::kFloat), at::MemoryFormat::Contiguous);
  float* out = total.data_ptr<float>();
  for (int64_t block = 0; block < g.blocks(); ++block) {
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      vfloat sum = {};
      const float* at = sums + (block * g.taps() + tap) * kLanes;
      for (int64_t slot = 0; slot < slots; ++slot) sum += load(at + slot * size);
      for (int64_t lane = 0; lane < kLanes && block * kLanes + lane < g.channels; ++lane)
        out[(block * kLanes + lane) * g.taps() + tap] = sum[lane];
    }
  }
  grad_weight.copy_(total.view(grad_weight.sizes()));
}

template <typename Body>
void with_type(at::ScalarType type, const Body& body) {
  if (type == at::kFloat) return body(float{});
  if (type == at::kBFloat16) return body(at::BFloat16{});
  TORCH_CHECK_VALUE(type == at::kHalf, "depthwise_conv takes float32, bfloat16 and float16, got ", type);
  body(at::Half{});
}

at::Tensor channels_last(const at::Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

std::tuple<at::Tensor, at::Tensor> depthwise_conv_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                                           int64_t stride, int64_t dilation, at::IntArrayRef padding,
                                                           bool need_x, bool need_weight) {
  const Geometry g = geometry_of(x, weight, stride, dilation, padding);
  at::Tensor grad_x = need_x ? at::empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast) : x.new_empty({0});
  at::Tensor grad_weight = need_weight ? at::zeros_like(weight) : weight.new_empty({0});
  if (grad.numel() == 0) return {grad_x.zero_(), grad_weight};
  const at::Tensor input = channels_last(x), output = channels_last(grad);
  const rows::Scratch weights = blocked(weight, g);
  const int64_t input_plane = Planes::plane(g.width, g.before_input(), g.after_input());
  const int64_t output_plane = Planes::plane(g.columns, g.before_output(), g.after_output());
  const Plan plan(g, sizeof(float) * (g.input_rows() * input_plane + g.output_rows() * output_plane));
  const rows::Scratch sums(need_weight ? plan.slots() * g.blocks() * g.taps() * kLanes : 0);
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem{g, plan,
                             {input.const_data_ptr<T>(), g.height, g.width, g.channels},
                             {output.const_data_ptr<T>(), g.rows, g.columns, g.channels},
                             {need_x ? grad_x.data_ptr<T>() : nullptr, g.height, g.width, g.channels},
                             weights.data(), need_weight ? sums.data() : nullptr};
    run_tasks<Worker<T>>(plan.tasks(), problem,
                         [&](int64_t task, Worker<T>& worker) { worker.backward(Part(g, plan, task)); });
  });
  if (need_weight) add_slots(sums.data(), plan.slots(), g, grad_weight);
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace stpp

TORCH_LIBRARY_IMPL(stpp_kernels_cpp, CPU, m) {
  m.impl("depthwise_conv_backward", &stpp::depthwise_conv_backward);
}
