// y[b, s, o] = bias[o] + sum over i and the taps t in {0, 1}^axes of weight[o, i, t] x[b, 2 s + t, i]
// transposed: y[b, 2 s + t, i] = bias[i] + sum_o weight[o, i, t] x[b, s, o];  each is the other's gradient
// grad_weight[o, i, t] = sum_bs coarse[b, s, o] fine[b, 2 s + t, i]
//
// The two neighbours along the last axis lie next to each other: for each tap along the other axes, a line of voxels is a
// matrix product with rows of 2 I channels, in place.
#include "kernels.h"
#include "matrix_blocks.h"
#include "tiles.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

constexpr int64_t SUM_VOXELS = 1024;  // coarse, that are summed in float32, at least

template <bool VOLUME>
struct Lines {
  static constexpr int PAIRS = VOLUME ? 4 : 2;  // taps along all axes but the last, with pairs of voxels along that

  int64_t H, W, I;
  int64_t count;  // coarse lines
  explicit Lines(const StridedConvolution& a) : H(a.H), W(a.W), I(a.I), count(a.B * a.D * a.H) {}

  // Where the fine line of a coarse line and a tap begins.
  INLINE int64_t fine(int64_t line, int pair) const {
    const int64_t plane = line / H, y = line - plane * H;
    const int64_t fine_plane = VOLUME ? plane * 2 + pair / 2 : plane;
    return ((fine_plane * H + y) * 2 + pair % 2) * W * 2 * I;
  }
};

// The channels of both voxels of a pair are always a multiple of two vectors.
constexpr Columns<2> OF_PAIRS;
constexpr int64_t PAIR_COLUMNS = Columns<2>::COUNT;

// The tap of a pair and of one of its two voxels.
INLINE int tap(int pair, int64_t voxel) { return pair * 2 + int(voxel); }

template <bool VOLUME, int VECTORS>
void to_coarse(const StridedConvolutionForward& a, Columns<VECTORS> columns) {
  constexpr int64_t COLUMNS = Columns<VECTORS>::COUNT;
  using L = Lines<VOLUME>;
  const L lines(a);
  const int64_t K = 2 * a.I, O = a.O;
  const Finish finish(a.y, lines.count * a.W * O, a.negative_slope);
  Buffer<float> matrices(L::PAIRS * K * O, Fill::nothing);  // [pair, O / COLUMNS, K, COLUMNS]
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < K; ++k)
      for (int pair = 0; pair < L::PAIRS; ++pair)
        for (int64_t o = 0; o < O; ++o)
          matrices[pair * K * O + (o / COLUMNS * K + k) * COLUMNS + o % COLUMNS] =
              a.weight[o * a.out_stride + k % a.I * a.in_stride + tap(pair, k / a.I) * a.tap_stride];
#pragma omp for schedule(static)
    for (int64_t line = 0; line < lines.count; ++line) {
      Rows<L::PAIRS> fine{{}, K, 2 * a.W * K};  // ahead is the next coarse line's
      for (int pair = 0; pair < L::PAIRS; ++pair) fine.segments[pair] = a.x + lines.fine(line, pair);
      for (int64_t o = 0; o < O; o += COLUMNS)
        multiply_line(fine, columns, matrices + o * K, K * O, K, a.bias ? a.bias + o : nullptr, O, a.W,
                      finish.from(line * a.W * O + o));
    }
  }
}

template <bool VOLUME>
void to_fine(const StridedConvolutionForward& a) {
  using L = Lines<VOLUME>;
  const L lines(a);
  const int64_t K = a.O, N = 2 * a.I;
  const Finish finish(a.y, lines.count * a.W * L::PAIRS * N, a.negative_slope, a.added);
  Buffer<float> matrices(L::PAIRS * K * N, Fill::nothing);  // [pair, N / PAIR_COLUMNS, K, PAIR_COLUMNS]
  Buffer<float> bias(N);                                    // of both voxels of a pair
  if (a.bias)
    for (int64_t n = 0; n < N; ++n) bias[n] = a.bias[n % a.I];
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < K; ++k)
      for (int pair = 0; pair < L::PAIRS; ++pair)
        for (int64_t n = 0; n < N; ++n)
          matrices[pair * K * N + (n / PAIR_COLUMNS * K + k) * PAIR_COLUMNS + n % PAIR_COLUMNS] =
              a.weight[k * a.out_stride + n % a.I * a.in_stride + tap(pair, n / a.I) * a.tap_stride];
#pragma omp for schedule(static)
    for (int64_t line = 0; line < lines.count; ++line) {
      const Rows<1> coarse{{a.x + line * a.W * K}, K};
      for (int pair = 0; pair < L::PAIRS; ++pair)
        for (int64_t n = 0; n < N; n += PAIR_COLUMNS)
          multiply_line(coarse, OF_PAIRS, matrices + (pair * N + n) * K, 0, K, bias + n, N, a.W,
                        finish.from(lines.fine(line, pair) + n));
    }
  }
}

template <bool VOLUME>
void weight_gradient(const StridedConvolutionWeight& a) {
  using L = Lines<VOLUME>;
  const L lines(a);
  const int64_t O = a.O, N = 2 * a.I, count = L::PAIRS * O * N;
  const int64_t part_lines = SUM_VOXELS / maximum(int64_t(1), a.W) + 1;
  Buffer<double> total(count);  // [pair, O, N]
  OutOfMemory out_of_memory;
#pragma omp parallel num_threads(a.threads)
  {
    OfThread<Buffer<float>> scratch(out_of_memory, [&] { return Buffer<float>(count); });
#pragma omp for ordered schedule(dynamic, 1)
    for (int64_t first = 0; first < lines.count; first += part_lines) {
      if (!scratch) continue;
      float* const sums = *scratch;
      memset(sums, 0, count * sizeof(float));
      for (int64_t line = first; line < minimum(lines.count, first + part_lines); ++line)
        for (int pair = 0; pair < L::PAIRS; ++pair)
          for (int64_t n = 0; n < N; n += PAIR_COLUMNS)
            for (int64_t o = 0; o < O; o += SUM_ROWS)
              add_products(OF_PAIRS, a.coarse + line * a.W * O + o, O, a.fine + lines.fine(line, pair) + n, N, a.W,
                           sums + (pair * O + o) * N + n, N);
      // In the order of the parts, so that any number of threads gives the same result.
#pragma omp ordered
      for (int64_t i = 0; i < count; ++i) total[i] += sums[i];
    }
  }
  out_of_memory.rethrow();
  for (int pair = 0; pair < L::PAIRS; ++pair)
    for (int64_t o = 0; o < O; ++o)
      for (int64_t n = 0; n < N; ++n)
        a.grad_weight[o * a.out_stride + n % a.I * a.in_stride + tap(pair, n / a.I) * a.tap_stride] =
            float(total[(pair * O + o) * N + n]);
}

}  // namespace

void strided_convolution_forward(const StridedConvolutionForward& a) {
  with_columns(a.O, [&](auto columns) { a.volume ? to_coarse<true>(a, columns) : to_coarse<false>(a, columns); });
}

void strided_convolution_transposed(const StridedConvolutionForward& a) { a.volume ? to_fine<true>(a) : to_fine<false>(a); }

void strided_convolution_weight(const StridedConvolutionWeight& a) {
  a.volume ? weight_gradient<true>(a) : weight_gradient<false>(a);
}

}  // namespace semiseg::SEMISEG_LEVEL
