// The convolution of convolution_cpu.cpp for few channels read, as of the first layer: the sum itself, without transforms.
//
// Along the last axis the three taps of all channels lie next to each other: for each tap along the other axes, a line of
// voxels is a matrix product with rows of 3 I values, each I behind the last.
#include "kernels.h"
#include "matrix_blocks.h"
#include "tile.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

// The values of three taps.
INLINE int64_t of_taps(int64_t I) { return 3 * I; }
template <int64_t I>
INLINE Constant<3 * I> of_taps(Constant<I>) {
  return {};
}

template <bool VOLUME, class Channels, int VECTORS>
void forward(const ConvolutionForward& a, Channels I, Columns<VECTORS> columns) {
  constexpr int64_t COLUMNS = Columns<VECTORS>::COUNT;
  constexpr int LINES = VOLUME ? 9 : 3, TAPS = 3 * LINES;
  const auto K = of_taps(I);
  const int64_t O = a.O, padded = (a.W + 2) * I;
  const Finish finish(a.y, a.B * a.D * a.H * a.W * O, a.negative_slope);
  Buffer<float> matrices(LINES * K * O, Fill::nothing);  // [line, O / COLUMNS, K, COLUMNS]
  for (int64_t o = 0; o < O; ++o)
    for (int tap = 0; tap < TAPS; ++tap)
      for (int64_t i = 0; i < I; ++i)
        matrices[tap / 3 * K * O + (o / COLUMNS * K + tap % 3 * I + i) * COLUMNS + o % COLUMNS] =
            a.weight[o * a.out_stride + i * a.in_stride + (a.mirrored ? TAPS - 1 - tap : tap) * a.tap_stride];
#pragma omp parallel num_threads(a.threads)
  {
    Buffer<float> lines(LINES * padded);  // with a voxel of zeros at either end
#pragma omp for schedule(static)
    for (int64_t line = 0; line < a.B * a.D * a.H; ++line) {
      const int64_t plane = line / a.H, y = line - plane * a.H, z = plane % a.D;
      Rows<LINES, Channels> rows{{}, I};
      for (int n = 0; n < LINES; ++n) {
        const int64_t dz = VOLUME ? n / 3 - 1 : 0, dy = n % 3 - 1;
        float* copy = lines + n * padded;
        rows.segments[n] = copy;
        if (z + dz >= 0 && z + dz < a.D && y + dy >= 0 && y + dy < a.H)
          memcpy(copy + I, a.x + (line + dz * a.H + dy) * a.W * I, a.W * I * sizeof(float));
        else
          memset(copy + I, 0, a.W * I * sizeof(float));
      }
      for (int64_t o = 0; o < O; o += COLUMNS)
        multiply_line(rows, columns, matrices + o * K, K * O, K, a.bias ? a.bias + o : nullptr, O, a.W,
                      finish.from(line * a.W * O + o));
    }
  }
}

}  // namespace

void narrow_convolution_forward(const ConvolutionForward& a) {
  with_columns(a.O, [&](auto columns) {
    const auto with_channels = [&](auto I) { a.volume ? forward<true>(a, I, columns) : forward<false>(a, I, columns); };
    a.I == 1 ? with_channels(Constant<1>{}) : with_channels(a.I);
  });
}

}  // namespace semiseg::SEMISEG_LEVEL
