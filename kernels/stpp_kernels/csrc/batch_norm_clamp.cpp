// Batch norm with the statistics of the batch, clamped, and its gradients, on the CPU. Formulas:
// batch_norm_clamp.py.
//
// A map in channels_last is a matrix [pixels][channels]. A task is a chunk of whole pixels that fits in the
// second-level cache, so the sum of squared deviations from the chunk's own mean costs no second read of
// memory. Chunks depend on the shape alone and are merged in order, in double precision, so results do not
// depend on the number of threads.
#include <torch/library.h>

#include <cmath>

#include "lanes.h"
#include "rows.h"

namespace stpp {
namespace {

constexpr int64_t kChunk = 128 << 10;  // approximate bytes of a chunk of one map
constexpr int64_t kPixels = 4;         // pixels per iteration: loads and stores a sum once for all of them

struct Shape {
  int64_t pixels, channels, blocks, chunk, chunks;  // chunk: pixels

  explicit Shape(const at::Tensor& x)
      : pixels(x.size(0) * x.size(2) * x.size(3)), channels(x.size(1)),
        blocks((channels + kLanes - 1) / kLanes),
        chunk(std::max<int64_t>(kPixels, kChunk / (channels * x.element_size()))),
        chunks((pixels + chunk - 1) / chunk) {}

  int64_t padded() const { return blocks * kLanes; }  // channels, rounded up
  int64_t size(int64_t task) const { return std::min(chunk, pixels - task * chunk); }

  // Calls body(offset of the channels, offset of the first value, pixels, lanes) for vectors of neighbouring
  // pixels of a chunk; the lanes of whole vectors are a constant.
  template <typename Body>
  void each(int64_t task, const Body& body) const {
    const int64_t last = task * chunk + size(task);
    for (int64_t pixel = task * chunk; pixel < last; pixel += kPixels) {
      const int64_t count = std::min(kPixels, last - pixel);
      int64_t c = 0;
      for (; c + kLanes <= channels; c += kLanes)
        body(c, pixel * channels + c, count, std::integral_constant<int64_t, kLanes>{});
      if (c < channels) body(c, pixel * channels + c, count, channels - c);
    }
  }

  template <typename Body>
  void each_task(const Body& body) const {
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) body(task);
    });
  }
};

// Two numbers for every channel of every chunk: [chunk][2][padded].
struct Partial {
  const Shape& s;
  rows::Scratch memory;

  explicit Partial(const Shape& shape) : s(shape), memory(s.chunks * 2 * s.padded()) {}
  float* first(int64_t task) const { return memory.data() + task * 2 * s.padded(); }
  float* second(int64_t task) const { return first(task) + s.padded(); }
};

// Numbers of each channel in whole vectors; zero after the last channel.
struct Channels {
  rows::Scratch memory;
  explicit Channels(const Shape& s) : memory(s.padded()) {}
  float& operator[](int64_t c) const { return memory.data()[c]; }
  vfloat at(int64_t c) const { return load(memory.data() + c); }
};

// Mean, and sum of squared deviations from it, of a chunk.
template <typename T>
void moments(const Shape& s, int64_t task, const T* x, const Partial& into) {
  float *mean = into.first(task), *squares = into.second(task);
  s.each(task, [&](int64_t c, int64_t at, int64_t count, auto lanes) {
    vfloat sum = load(mean + c);
    for (int64_t i = 0; i < count; ++i) sum += load_part(x + at + i * s.channels, lanes);
    store(mean + c, sum);
  });
  const float share = 1.f / static_cast<float>(s.size(task));
  for (int64_t c = 0; c < s.padded(); c += kLanes) store(mean + c, load(mean + c) * share);
  s.each(task, [&](int64_t c, int64_t at, int64_t count, auto lanes) {
    vfloat sum = load(squares + c);
    const vfloat middle = load(mean + c);
    for (int64_t i = 0; i < count; ++i) {
      const vfloat apart = load_part(x + at + i * s.channels, lanes) - middle;
      sum += apart * apart;
    }
    store(squares + c, sum);
  });
}

// Mean and variance of all pixels.
void merge_moments(const Shape& s, const Partial& chunks, float* mean, float* variance) {
  std::vector<double> middle(s.channels), squares(s.channels);
  double before = 0;
  for (int64_t task = 0; task < s.chunks; ++task) {
    const float *chunk_mean = chunks.first(task), *chunk_squares = chunks.second(task);
    const double size = static_cast<double>(s.size(task)), share = size / (before + size);
    for (int64_t c = 0; c < s.channels; ++c) {
      const double apart = chunk_mean[c] - middle[c];
      middle[c] += apart * share;
      squares[c] += chunk_squares[c] + apart * apart * before * share;
    }
    before += size;
  }
  for (int64_t c = 0; c < s.channels; ++c) {
    mean[c] = static_cast<float>(middle[c]);
    variance[c] = static_cast<float>(squares[c] / before);
  }
}

// Parameters of the operator.
struct Parameters {
  const at::Tensor &weight, &bias;
  double low, high, eps;
};

// Normalisation of each channel: (x - mean) * scale + bias.
struct Normalisation {
  Channels mean, scale, bias, inverse;  // inverse: 1 / standard deviation
  vfloat low, high;

  Normalisation(const Shape& s, const at::Tensor& means, const at::Tensor& variances, const Parameters& p)
      : mean(s), scale(s), bias(s), inverse(s), low(splat(static_cast<float>(p.low))),
        high(splat(static_cast<float>(p.high))) {
    const at::Tensor factor = p.weight.to(at::kFloat).contiguous();
    const at::Tensor addend = p.bias.to(at::kFloat).contiguous();
    for (int64_t c = 0; c < s.channels; ++c) {
      mean[c] = means.const_data_ptr<float>()[c];
      inverse[c] = static_cast<float>(1 / std::sqrt(variances.const_data_ptr<float>()[c] + p.eps));
      scale[c] = factor.const_data_ptr<float>()[c] * inverse[c];
      bias[c] = addend.const_data_ptr<float>()[c];
    }
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_clamp(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double low, double high, double eps) {
  const Shape s(x);
  const at::Tensor input = channels_last(x);
  at::Tensor out = at::empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast);
  at::Tensor mean = at::empty({s.channels}, x.options().dtype(at::kFloat)), variance = at::empty_like(mean);
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const T* source = input.const_data_ptr<T>();
    T* target = out.data_ptr<T>();
    const Partial partial(s);
    s.each_task([&](int64_t task) { moments(s, task, source, partial); });
    merge_moments(s, partial, mean.data_ptr<float>(), variance.data_ptr<float>());
    const Normalisation norm(s, mean, variance, {weight, bias, low, high, eps});
    s.each_task([&](int64_t task) {
      s.each(task, [&](int64_t c, int64_t at, int64_t count, auto lanes) {
        const vfloat middle = norm.mean.at(c), scale = norm.scale.at(c), addend = norm.bias.at(c);
        for (int64_t i = 0; i < count; ++i) {
          vfloat y = (load_part(source + at + i * s.channels, lanes) - middle) * scale + addend;
          y = y < norm.low ? norm.low : y;  // comparisons with NaN are false, so NaN stays NaN
          store_part(target + at + i * s.channels, y > norm.high ? norm.high : y, lanes);
        }
      });
    });
  });
  return {out, mean, variance};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_clamp_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& variance,
    const at::Tensor& weight, const at::Tensor& bias, double low, double high, double eps) {
  const Shape s(x);
  const at::Tensor input = channels_last(x), output = channels_last(grad);
  at::Tensor grad_x = at::empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast);
  at::Tensor grad_weight = at::empty({s.channels}, x.options().dtype(at::kFloat));
  at::Tensor grad_bias = at::empty_like(grad_weight);
  const Normalisation norm(s, mean, variance, {weight, bias, low, high, eps});
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const T *source = input.const_data_ptr<T>(), *gradient = output.const_data_ptr<T>();
    T* target = grad_x.data_ptr<T>();
    const Partial partial(s);
    // Calls body(distance from the mean, gradient of the normalised value, offset) for pixels of a vector.
    const auto each_pixel = [&](int64_t c, int64_t at, int64_t count, auto lanes, const auto& body) {
      const vfloat middle = norm.mean.at(c), scale = norm.scale.at(c), addend = norm.bias.at(c);
      for (int64_t i = 0, from = at; i < count; ++i, from += s.channels) {
        const vfloat apart = load_part(source + from, lanes) - middle, y = apart * scale + addend;
        const vint outside = (y <= norm.low) | (y >= norm.high);
        body(apart, select(outside, vfloat{}, load_part(gradient + from, lanes)), from);
      }
    };
    s.each_task([&](int64_t task) {
      float *sums = partial.first(task), *products = partial.second(task);
      s.each(task, [&](int64_t c, int64_t at, int64_t count, auto lanes) {
        vfloat sum = load(sums + c), product = load(products + c);
        each_pixel(c, at, count, lanes,
                   [&](vfloat apart, vfloat g, int64_t) { sum += g, product += g * apart; });
        store(sums + c, sum), store(products + c, product);
      });
    });
    const Channels mean_gradient(s), slope(s);
    for (int64_t c = 0; c < s.channels; ++c) {
      double sum = 0, product = 0;
      for (int64_t task = 0; task < s.chunks; ++task)
        sum += partial.first(task)[c], product += partial.second(task)[c];
      const double inverse = norm.inverse[c], pixels = static_cast<double>(s.pixels);
      grad_bias.data_ptr<float>()[c] = static_cast<float>(sum);
      grad_weight.data_ptr<float>()[c] = static_cast<float>(product * inverse);
      mean_gradient[c] = static_cast<float>(sum / pixels);
      slope[c] = static_cast<float>(product * inverse * inverse / pixels);
    }
    s.each_task([&](int64_t task) {
      s.each(task, [&](int64_t c, int64_t at, int64_t count, auto lanes) {
        const vfloat scale = norm.scale.at(c), common = mean_gradient.at(c), linear = slope.at(c);
        each_pixel(c, at, count, lanes, [&](vfloat apart, vfloat g, int64_t to) {
          store_part(target + to, (g - common - apart * linear) * scale, lanes);
        });
      });
    });
  });
  return {grad_x, grad_weight.to(weight.scalar_type()), grad_bias.to(bias.scalar_type())};
}

}  // namespace
}  // namespace stpp

TORCH_LIBRARY_IMPL(stpp_kernels_cpp, CPU, m) {
  m.impl("batch_norm_clamp", &stpp::batch_norm_clamp);
  m.impl("batch_norm_clamp_backward", &stpp::batch_norm_clamp_backward);
}
