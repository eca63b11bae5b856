// The convolution of convolution_cpu.cpp for few channels read, as of the first layer, and the gradient of its weight: the
// sums themselves, without transforms.
//
// Along the last axis the three taps of all channels lie next to each other: for each tap along the other axes, a line of
// voxels is a matrix product with rows of 3 I values, each I behind the last.
#include "narrow_convolution.h"

#include "matrix_blocks.h"
#include "tiles.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

constexpr int64_t SUM_VOXELS = 1024;  // that are summed in float32, at least
constexpr int SUM_LINES = WIDTH == CHANNELS ? 3 : 1;  // whose sums are in registers together, three for each

// The values of three taps.
INLINE int64_t of_taps(int64_t I) { return 3 * I; }
template <int64_t I>
INLINE Constant<3 * I> of_taps(Constant<I>) {
  return {};
}

// Copies of the lines of x that a line of voxels reads, with a voxel of zeros at either end.
template <bool VOLUME>
struct Neighbours {
  static constexpr int LINES = VOLUME ? 9 : 3;

  int64_t length;
  Buffer<float> copies;

  explicit Neighbours(const Convolution& a) : length((a.W + 2) * a.I), copies(LINES * length) {}

  float* line(int n) const { return copies + n * length; }

  void read(const Convolution& a, const float* x, int64_t line_number) const {
    const int64_t plane = line_number / a.H, y = line_number - plane * a.H, z = plane % a.D;
    const int64_t bytes = a.W * a.I * int64_t(sizeof(float));
    for (int n = 0; n < LINES; ++n) {
      const int64_t dz = VOLUME ? n / 3 - 1 : 0, dy = n % 3 - 1;
      float* copy = line(n) + a.I;
      if (z + dz >= 0 && z + dz < a.D && y + dy >= 0 && y + dy < a.H)
        memcpy(copy, x + (line_number + dz * a.H + dy) * a.W * a.I, bytes);
      else
        memset(copy, 0, bytes);
    }
  }
};

// matrices[line, O / COLUMNS, K, COLUMNS]
template <bool VOLUME, class Channels, int VECTORS>
void arrange_weight(ConvolutionMatrices& a, Channels I, Columns<VECTORS>) {
  constexpr int64_t COLUMNS = Columns<VECTORS>::COUNT;
  constexpr int TAPS = 3 * Neighbours<VOLUME>::LINES;
  const auto K = of_taps(I);
  const int64_t O = a.O;
  a.count = TAPS * I * O;
  a.columns = COLUMNS;
  a.turned = false;
  if (!a.matrices) return;
  for (int64_t o = 0; o < O; ++o)
    for (int tap = 0; tap < TAPS; ++tap)
      for (int64_t i = 0; i < I; ++i)
        a.matrices[tap / 3 * K * O + (o / COLUMNS * K + tap % 3 * I + i) * COLUMNS + o % COLUMNS] =
            a.weight[o * a.out_stride + i * a.in_stride + (a.mirrored ? TAPS - 1 - tap : tap) * a.tap_stride];
}

template <bool VOLUME, class Channels, int VECTORS>
void forward(const ConvolutionForward& a, Channels I, Columns<VECTORS> columns) {
  constexpr int64_t COLUMNS = Columns<VECTORS>::COUNT;
  constexpr int LINES = Neighbours<VOLUME>::LINES;
  const auto K = of_taps(I);
  const int64_t O = a.O;
  const Finish finish(a.y, a.voxels() * O, a.negative_slope);
  OutOfMemory out_of_memory;
#pragma omp parallel num_threads(a.threads)
  {
    OfThread<Neighbours<VOLUME>> scratch(out_of_memory, [&] { return Neighbours<VOLUME>(a); });
#pragma omp for schedule(static)
    for (int64_t line = 0; line < a.B * a.D * a.H; ++line) {
      if (!scratch) continue;
      const Neighbours<VOLUME>& neighbours = *scratch;
      neighbours.read(a, a.x, line);
      Rows<LINES, Channels> rows{{}, I};
      for (int n = 0; n < LINES; ++n) rows.segments[n] = neighbours.line(n);
      for (int64_t o = 0; o < O; o += COLUMNS)
        multiply_line(rows, columns, a.matrices + o * K, K * O, K, a.bias ? a.bias + o : nullptr, O, a.W,
                      finish.from(line * a.W * O + o));
    }
  }
  out_of_memory.rethrow();
}

// sums[n, k, o] += sum over the voxels t of lines[n][(t + k) I] grad_y[t, o] for SUM_LINES n, three k and the columns o
template <class Channels, int VECTORS>
INLINE void add_taps(Columns<VECTORS>, const float* lines, int64_t length, Channels I, const float* grad_y, int64_t O,
                     int64_t W, float* sums, int64_t sums_stride) {
  for (int64_t first = 0; first < W; first += SUMMED_PRODUCTS) {
    vfloat few[SUM_LINES][3][VECTORS] = {};
    for (int64_t t = first; t < minimum(W, first + SUMMED_PRODUCTS); ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) {
        const vfloat column = load(grad_y + t * O + v * WIDTH);
#pragma GCC unroll 3
        for (int n = 0; n < SUM_LINES; ++n)
#pragma GCC unroll 3
          for (int k = 0; k < 3; ++k) few[n][k][v] += lines[n * length + (t + k) * I] * column;
      }
    }
#pragma GCC unroll 3
    for (int n = 0; n < SUM_LINES; ++n)
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
          float* sum = sums + (n * 3 + k) * sums_stride + v * WIDTH;
          store(sum, load(sum) + few[n][k][v]);
        }
  }
}

template <bool VOLUME>
struct Scratch {  // of one thread
  Neighbours<VOLUME> neighbours;
  Buffer<float> sums;
};

template <bool VOLUME, class Channels, int VECTORS>
void weight_gradient(const ConvolutionWeight& a, Channels I, Columns<VECTORS> columns) {
  constexpr int LINES = Neighbours<VOLUME>::LINES, TAPS = 3 * LINES;
  const int64_t O = a.O, count = TAPS * I * O, lines = a.B * a.D * a.H;
  const int64_t part_lines = SUM_VOXELS / maximum(int64_t(1), a.W) + 1;
  Buffer<double> total(count);  // [tap, I, O]
  OutOfMemory out_of_memory;
#pragma omp parallel num_threads(a.threads)
  {
    OfThread<Scratch<VOLUME>> scratch(out_of_memory, [&] {
      return Scratch<VOLUME>{Neighbours<VOLUME>(a), Buffer<float>(count)};
    });
#pragma omp for ordered schedule(dynamic, 1)
    for (int64_t first = 0; first < lines; first += part_lines) {
      if (!scratch) continue;
      const Neighbours<VOLUME>& neighbours = (*scratch).neighbours;
      float* const sums = (*scratch).sums;
      memset(sums, 0, count * sizeof(float));
      for (int64_t line = first; line < minimum(lines, first + part_lines); ++line) {
        neighbours.read(a, a.x, line);
        for (int64_t i = 0; i < I; ++i)
          for (int64_t o = 0; o < O; o += Columns<VECTORS>::COUNT)
            for (int n = 0; n < LINES; n += SUM_LINES)
              add_taps(columns, neighbours.line(n) + i, neighbours.length, I, a.grad_y + line * a.W * O + o, O, a.W,
                       sums + (n * 3 * I + i) * O + o, I * O);
      }
      // In the order of the parts, so that any number of threads gives the same result.
#pragma omp ordered
      for (int64_t j = 0; j < count; ++j) total[j] += sums[j];
    }
  }
  out_of_memory.rethrow();
  for (int tap = 0; tap < TAPS; ++tap)
    for (int64_t i = 0; i < I; ++i)
      for (int64_t o = 0; o < O; ++o)
        a.grad_weight[o * a.out_stride + i * a.in_stride + tap * a.tap_stride] = float(total[(tap * I + i) * O + o]);
}

// Runs work(I, columns), with one channel as a number that the compiler knows.
template <class Work>
void with_channels(const Convolution& a, const Work& work) {
  with_columns(a.O, [&](auto columns) { a.I == 1 ? work(Constant<1>{}, columns) : work(a.I, columns); });
}

}  // namespace

void narrow_convolution_matrices(ConvolutionMatrices& a) {
  with_channels(a, [&](auto I, auto columns) {
    a.volume ? arrange_weight<true>(a, I, columns) : arrange_weight<false>(a, I, columns);
  });
}

void narrow_convolution_forward(const ConvolutionForward& a) {
  with_channels(a, [&](auto I, auto columns) {
    a.volume ? forward<true>(a, I, columns) : forward<false>(a, I, columns);
  });
}

void narrow_convolution_weight(const ConvolutionWeight& a) {
  with_channels(a, [&](auto I, auto columns) {
    a.volume ? weight_gradient<true>(a, I, columns) : weight_gradient<false>(a, I, columns);
  });
}

}  // namespace semiseg::SEMISEG_LEVEL
