// Backward pass of depthwise_conv on the CPU. Derivation: depthwise_conv.py.
//
// Channels are processed in blocks of 16, one vector of fp32; a task is some rows of some images, for a chunk
// of blocks. It iterates down the rows and keeps the last few of both maps as fp32 planes
// [block][column][16], between columns of zeros for the padding: a row is widened once, no tap needs a border
// test, and the data of the inner loops is contiguous and in the second-level cache. There are two inner
// loops:
//   - gather: neighbouring input gradients, summed over the taps that reach them;
//   - add_products: rows of taps of the weight gradient, summed over a row of outputs.
// Each task has its own sums of the weight gradient, which are added in the order of the tasks; tasks depend
// on the shape alone, so results do not depend on the number of threads.
#include <torch/library.h>

#include <numeric>

#include "depthwise_loops.h"
#include "depthwise_planes.h"

namespace stpp {
namespace {

using namespace depthwise;

constexpr int64_t kTasks = 64;          // approximate number of tasks; depends on the shape alone
constexpr int64_t kPlanes = 256 << 10;  // maximum bytes of planes of a chunk of channels
constexpr int64_t kLeastBlocks = 4;     // minimum blocks of a chunk: two cache lines of 16-bit values
constexpr int64_t kLeastRows = 8;       // minimum rows of a band: smaller ones reread too many rows

// Splits the work into chunks of blocks, and each of them into groups of images or, if that gives few tasks,
// into bands of rows, which read some of their neighbours' rows again.
struct Plan {
  int64_t chunk, chunks, bands, group, groups;  // chunk: blocks; group: images

  Plan(const Geometry& g, int64_t bytes_per_block) {
    const int64_t blocks = g.blocks(), enough = std::max(kLeastBlocks, blocks * g.images / kTasks);
    const int64_t fitting = std::max<int64_t>(2, std::min(kPlanes / bytes_per_block, enough));
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

template <typename T>
struct Problem {
  const Geometry g;
  const Plan plan;
  const Map<const T> input, grad;
  const Map<T> grad_input;  // without data if not needed
  const float* weights;     // [block][tap][16]
  float* sums;              // of the weight gradient, [slot][block][tap][16]; null if not needed
};

// Range of a task: images, rows of outputs, blocks of channels.
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
        grad_(g_.columns, g_.before_output(), g_.after_output(), g_.output_rows(), p.plan.chunk),
        add_rows_(add_rows_of(g_)) {}

  void backward(const Part& part) {
    for (int64_t image = part.first_image; image < part.last_image; ++image) {
      input_.forget(), grad_.forget();
      for (int64_t row = part.first_row; row < part.last_row; ++row) {
        if (p_.sums) weight_gradient_row(part, image, row);
        if (!p_.grad_input.data) continue;
        const auto reached = [&](int64_t first) {
          return std::clamp<int64_t>(first * g_.stride - g_.top, 0, g_.height);
        };
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
  const float* weight(int64_t block, int64_t tap) const {
    return p_.weights + (block * g_.taps() + tap) * kLanes;
  }

  // Input y has the taps ky with y + top - ky dilation = stride * row of the output, and the same holds along
  // x: columns whose x + left have the same remainder have the same taps, every `step`th of a row, which read
  // outputs `gap` apart.
  void input_gradient_row(const Part& part, int64_t image, int64_t y) {
    const int64_t common = std::gcd(g_.stride, g_.dilation), step = g_.stride / common,
                  gap = g_.dilation / common;
    for (int64_t remainder = 0; remainder < g_.stride; ++remainder) {
      const int64_t x = ((remainder - g_.left) % g_.stride + g_.stride) % g_.stride;
      if (x >= g_.width) continue;
      int64_t first = 0;  // tap
      while (first < step && (x + g_.left - first * g_.dilation) % g_.stride != 0) ++first;
      const int64_t taps = first < step ? divide_up(std::max<int64_t>(g_.kernel - first, 0), step) : 0;
      const bool at_once =
          (gap == 1 && (taps == 2 || taps == 3 || taps == 5)) || (gap == 2 && (taps == 3 || taps == 5));
      taps_.clear();
      for (int64_t ky = 0; ky < g_.kernel; ++ky) {
        const int64_t at = y + g_.top - ky * g_.dilation;
        if (at < 0 || at % g_.stride != 0 || at / g_.stride >= g_.rows) continue;
        const float* source = grad_row(part, image, at / g_.stride);
        for (int64_t tap = taps - 1; tap >= 0; tap -= at_once ? taps : 1) {
          const int64_t kx = first + tap * step, from = (x + g_.left - kx * g_.dilation) / g_.stride;
          taps_.push_back({source + from * kLanes, weight(part.block, ky * g_.kernel + kx)});
        }
      }
      T* target = p_.grad_input.at(image, y, part.block) + x * g_.channels;
      gather_row(part, at_once ? taps : 1, gap, -step * kLanes, divide_up(g_.width - x, g_.stride), target);
    }
  }

  // Gathers the collected rows of `taps` taps, for all blocks of the part.
  void gather_row(const Part& part, int64_t taps, int64_t gap, int64_t weight_step, int64_t count,
                  T* target) {
    const int64_t apart = g_.stride * g_.channels;
    for (int64_t block = part.block; block < part.block + part.count; ++block, target += kLanes) {
      const int64_t lanes = p_.grad_input.lanes(block);
      if (lanes == kLanes) {  // a separate loop, so that the sums stay in registers
        gather_taps(taps, gap, weight_step, count,
                    [=](int64_t j, vfloat sum) { store_lanes(target + j * apart, sum); });
      } else {
        gather_taps(taps, gap, weight_step, count,
                    [=](int64_t j, vfloat sum) { store_part(target + j * apart, sum, lanes); });
      }
      for (TapRow& row : taps_) row.source += grad_.stride(), row.weight += g_.taps() * kLanes;
    }
  }

  template <typename Out>
  void gather_taps(int64_t taps, int64_t gap, int64_t weight_step, int64_t count, const Out& out) {
    const TapRow* rows = taps_.data();
    const int64_t num_rows = static_cast<int64_t>(taps_.size());
    if (taps == 5 && gap == 1) return gather<5, 1>(rows, num_rows, weight_step, count, out);
    if (taps == 5) return gather<5, 2>(rows, num_rows, weight_step, count, out);
    if (taps == 3 && gap == 1) return gather<3, 1>(rows, num_rows, weight_step, count, out);
    if (taps == 3) return gather<3, 2>(rows, num_rows, weight_step, count, out);
    if (taps == 2) return gather<2, 1>(rows, num_rows, weight_step, count, out);
    gather<1, 1>(rows, num_rows, weight_step, count, out);
  }

  void weight_gradient_row(const Part& part, int64_t image, int64_t row) {
    const float* grad = grad_row(part, image, row);
    rows_.clear();
    for (int64_t ky = 0; ky < g_.kernel; ++ky) {
      const int64_t y = row * g_.stride - g_.top + ky * g_.dilation;
      if (y < 0 || y >= g_.height) continue;
      float* sums = p_.sums + ((part.slot * g_.blocks() + part.block) * g_.taps() + ky * g_.kernel) * kLanes;
      rows_.push_back({input_row(part, image, y) - g_.left * kLanes, sums});
    }
    for (int64_t block = 0; block < part.count; ++block, grad += grad_.stride()) {
      add_rows_(grad, rows_.data(), static_cast<int64_t>(rows_.size()), g_);
      for (WeightRow& each : rows_) each.source += input_.stride(), each.sums += g_.taps() * kLanes;
    }
  }

  const Problem<T>& p_;
  const Geometry& g_;
  Planes input_, grad_;
  const AddRows add_rows_;
  std::vector<TapRow> taps_;
  std::vector<WeightRow> rows_;
};

Geometry geometry_of(const at::Tensor& x, const at::Tensor& weight, int64_t stride, int64_t dilation,
                     at::IntArrayRef padding) {
  Geometry g{x.size(0), x.size(1), x.size(2), x.size(3), weight.size(2), stride,
             dilation, padding[2], padding[0], 0, 0};
  g.rows = (g.height + padding[2] + padding[3] - g.span() - 1) / stride + 1;
  g.columns = (g.width + padding[0] + padding[1] - g.span() - 1) / stride + 1;
  return g;
}

// Rearranges the weights [C, 1, K, K] to [block][tap][16].
rows::Scratch blocked(const at::Tensor& weight, const Geometry& g) {
  const at::Tensor plain = weight.to(at::kFloat).contiguous();
  const float* source = plain.const_data_ptr<float>();
  rows::Scratch weights(g.blocks() * g.taps() * kLanes);
  for (int64_t c = 0; c < g.channels; ++c)
    for (int64_t tap = 0; tap < g.taps(); ++tap)
      weights.data()[(c / kLanes * g.taps() + tap) * kLanes + c % kLanes] = source[c * g.taps() + tap];
  return weights;
}

// Adds the sums of all slots, in order.
void add_slots(const float* sums, int64_t slots, const Geometry& g, const at::Tensor& grad_weight) {
  const int64_t size = g.blocks() * g.taps() * kLanes;
  at::Tensor total = at::empty({g.channels, g.taps()}, grad_weight.options().dtype(at::kFloat),
                               at::MemoryFormat::Contiguous);
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

std::tuple<at::Tensor, at::Tensor> depthwise_conv_backward(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& weight, int64_t stride,
                                                           int64_t dilation, at::IntArrayRef padding,
                                                           bool need_x, bool need_weight) {
  const Geometry g = geometry_of(x, weight, stride, dilation, padding);
  at::Tensor grad_x =
      need_x ? at::empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast) : x.new_empty({0});
  at::Tensor grad_weight = need_weight ? at::zeros_like(weight) : weight.new_empty({0});
  if (grad.numel() == 0) return {grad_x.zero_(), grad_weight};
  const at::Tensor input = channels_last(x), output = channels_last(grad);
  const rows::Scratch weights = blocked(weight, g);
  const int64_t input_plane = Planes::plane(g.width, g.before_input(), g.after_input());
  const int64_t output_plane = Planes::plane(g.columns, g.before_output(), g.after_output());
  const Plan plan(g, sizeof(float) * (g.input_rows() * input_plane + g.output_rows() * output_plane));
  const rows::Scratch sums(need_weight ? plan.slots() * g.blocks() * g.taps() * kLanes : 0);
  with_type(x, [&](auto type) {
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
