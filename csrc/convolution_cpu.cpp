// y[b, s, o] = bias[o] + sum over i and the taps t in {-1, 0, 1}^axes of weight[o, i, t] x[b, s + t, i],  x = 0 outside
// grad_x is the same of grad_y, taps mirrored, channels exchanged; grad_weight[o, i, t] = sum_bs grad_y[b, s, o] x[b, s + t, i]
//
// Winograd's F(2, 3) along every axis but the last: two neighbouring results are A^T (G g * B^T d) of the four d they read,
//   B^T d = (d0 - d2, d1 + d2, d2 - d1, d1 - d3)
//   G g   = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)
//   A^T m = (m0 + m1 + m2, m1 - m2 - m3)
// and F(4, 3) along the last, of the polynomials' values at 0, +-NEAR_ROOT, +-FAR_ROOT and infinity: four results of six d.
// 4 products for 6, and 6 for 12: in a volume, 96 for the 432 of a tile of 2 x 2 x 4 voxels. The products of all channels
// are matrix products, one for each of a tile's points. The weight's gradient is the adjoint, G^T sum (A grad_y * B^T d).
// A volume's points are computed slice by slice, 4 x 6 of them: each has to do with two planes of x, and one or two of y.
// Source: A. Lavin, S. Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.
#include "kernels.h"
#include "matrix_blocks.h"
#include "tile.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

constexpr int LINE_POINTS = 6, LINE_VOXELS = 4;  // of a tile, along the last axis
constexpr int POINTS = 4 * LINE_POINTS;          // of a slice
constexpr int LINE_VECTORS = CHANNELS / WIDTH;   // of the channels that are transformed together
constexpr int64_t SUM_CHANNELS = 64;             // whose products are added up in a row
constexpr int64_t SUM_TILES = 1024;              // that the weight's gradient sums in float32
constexpr int64_t PREFETCHED = 4;                // voxels ahead

// How many tiles are a thread's at once: what fits, for most numbers of channels, into that much scratch.
struct Chunk {
  int64_t bytes, fewest, most;  // tiles in multiples of ROWS
};
constexpr Chunk FORWARD{128 << 10, 2 * ROWS, 96}, WEIGHT{256 << 10, 24, 96};  // the weight's sums are read once a chunk
constexpr int64_t FEWEST_OF_WIDE = 6 * ROWS, WIDE = 1 << 15;  // I O, from which a slice's matrices leave the caches in between

// The transforms along the first axis, for each of its points.
constexpr int NEAR[4] = {0, 1, 2, 1}, FAR[4] = {2, 2, 1, 3};  // planes of d in B^T d
constexpr float FAR_FACTOR[4] = {-1, 1, -1, -1};
constexpr float RESULT[2][4] = {{1, 1, 1, 0}, {0, 1, -1, -1}};   // A^T
constexpr float GRADIENT[2][4] = {{1, 1, 1, 0}, {0, 1, -1, 1}};  // A^T but for the last sign, see transform_sums

template <bool VOLUME>
struct Tiles {
  static constexpr int SLICES = VOLUME ? 4 : 1, OUT_DEPTH = VOLUME ? 2 : 1, KERNEL_DEPTH = VOLUME ? 3 : 1;
  static constexpr int TAPS = 9 * KERNEL_DEPTH;

  int64_t D, H, W;               // in voxels
  int64_t depth, height, width;  // in tiles
  int64_t count, chunk;          // tiles; of a chunk at most

  Tiles(const Convolution& a, const Chunk& limits) : D(a.D), H(a.H), W(a.W) {
    depth = VOLUME ? (D + 1) / 2 : D;
    height = (H + 1) / 2;
    width = (W + LINE_VOXELS - 1) / LINE_VOXELS;
    count = a.B * depth * height * width;
    const int64_t affordable = limits.bytes / (POINTS * (a.I + a.O) * int64_t(sizeof(float)));
    const int64_t fewest = a.I * a.O < WIDE ? limits.fewest : FEWEST_OF_WIDE;
    chunk = maximum(fewest, minimum(limits.most, affordable / ROWS * ROWS));
  }

  // Tiles a power of two apart would share few cache sets.
  static int64_t pitch(int64_t channels) { return POINTS * channels + CHANNELS; }

  struct Row {               // tiles that follow each other along the last axis
    int64_t image, z, y, x;  // the first voxel of the first tile
    int64_t n;
  };

  INLINE Row row(int64_t tile, int64_t last) const {
    const int64_t line = tile / width, x = tile - line * width;
    const int64_t plane = line / height, y = line - plane * height;
    const int64_t image = plane / depth, z = plane - image * depth;
    return {image, z * OUT_DEPTH, y * 2, x * LINE_VOXELS, minimum(width - x, last - tile)};
  }

  // Runs work(row, number of its first tile) on the rows of the tiles first to last.
  template <class Work>
  INLINE void for_rows(int64_t first, int64_t last, const Work& work) const {
    for (int64_t tile = first; tile < last;) {
      const Row next = row(tile, last);
      work(next, tile - first);
      tile += next.n;
    }
  }

  // The number of the first voxel of a line, below 0 outside.
  INLINE int64_t line(int64_t image, int64_t z, int64_t y) const {
    return z >= 0 && z < D && y >= 0 && y < H ? ((image * D + z) * H + y) * W : -1;
  }
};

// Along all axes but the last.

// d <- B^T d
INLINE void transform_input(vfloat& d0, vfloat& d1, vfloat& d2, vfloat& d3) {
  const vfloat m0 = d0 - d2, m1 = d1 + d2, m2 = d2 - d1, m3 = d1 - d3;
  d0 = m0, d1 = m1, d2 = m2, d3 = m3;
}

// One of the two of A^T m
INLINE vfloat transformed_result(const float* m, int64_t pitch, int which) {
  const vfloat m1 = load(m + pitch), m2 = load(m + 2 * pitch);
  return which == 0 ? load(m) + (m1 + m2) : (m1 - m2) - load(m + 3 * pitch);
}

// d <- A d but for the last one's sign
INLINE void transform_gradient(vfloat& d0, vfloat& d1, vfloat& d2, vfloat& d3) {
  d3 = d1;
  d2 = d0 - d1;
  d1 = d0 + d1;
}

// g <- G g
INLINE void transform_weight(vfloat& g0, vfloat& g1, vfloat& g2, vfloat& g3) {
  const vfloat outer = g0 + g2, inner = g1;
  g3 = g2;
  g1 = 0.5f * (outer + inner);
  g2 = 0.5f * (outer - inner);
}

// s0, s1, s2 <- G^T s, with the last one's sign as in A^T
INLINE void transform_sums(vfloat& s0, vfloat& s1, vfloat& s2, vfloat s3) {
  const vfloat half_sum = 0.5f * (s1 + s2), half_difference = 0.5f * (s1 - s2);
  s0 += half_sum;
  s1 = half_difference;
  s2 = half_sum - s3;
}

// Along the last axis. These roots round least of those that a float32 holds in a few bits.
constexpr float NEAR_ROOT = 0.625f, FAR_ROOT = 1.5f;
constexpr float NEAR_SQUARE = NEAR_ROOT * NEAR_ROOT, FAR_SQUARE = FAR_ROOT * FAR_ROOT;
// The values of the polynomials that vanish at all other roots.
constexpr float AT_ZERO = 1 / (NEAR_SQUARE * FAR_SQUARE);
constexpr float AT_NEAR = 0.5f / (NEAR_SQUARE * (NEAR_SQUARE - FAR_SQUARE));
constexpr float AT_FAR = 0.5f / (FAR_SQUARE * (FAR_SQUARE - NEAR_SQUARE));

// plus, minus <- even +- root odd
INLINE void at_roots(vfloat even, vfloat odd, float root, vfloat& plus, vfloat& minus) {
  plus = even + root * odd;
  minus = even - root * odd;
}

// d <- B^T d
INLINE void transform_line_input(vfloat (&d)[LINE_POINTS]) {
  const vfloat d1 = d[1], d2 = d[2], d3 = d[3], d4 = d[4];
  d[0] = (d4 - (NEAR_SQUARE + FAR_SQUARE) * d2) + NEAR_SQUARE * FAR_SQUARE * d[0];
  d[5] = (d[5] - (NEAR_SQUARE + FAR_SQUARE) * d3) + NEAR_SQUARE * FAR_SQUARE * d1;
  at_roots(d4 - FAR_SQUARE * d2, d3 - FAR_SQUARE * d1, NEAR_ROOT, d[1], d[2]);
  at_roots(d4 - NEAR_SQUARE * d2, d3 - NEAR_SQUARE * d1, FAR_ROOT, d[3], d[4]);
}

// The first four of m <- A^T m
INLINE void transform_line_result(vfloat (&m)[LINE_POINTS]) {
  const vfloat near_sum = m[1] + m[2], near_difference = NEAR_ROOT * (m[1] - m[2]);
  const vfloat far_sum = m[3] + m[4], far_difference = FAR_ROOT * (m[3] - m[4]);
  m[0] += near_sum + far_sum;
  m[1] = near_difference + far_difference;
  m[2] = NEAR_SQUARE * near_sum + FAR_SQUARE * far_sum;
  m[3] = (NEAR_SQUARE * near_difference + FAR_SQUARE * far_difference) + m[5];
}

// d <- A (d0, d1, d2, d3)
INLINE void transform_line_gradient(vfloat (&d)[LINE_POINTS]) {
  const vfloat d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
  at_roots(d0 + NEAR_SQUARE * d2, d1 + NEAR_SQUARE * d3, NEAR_ROOT, d[1], d[2]);
  at_roots(d0 + FAR_SQUARE * d2, d1 + FAR_SQUARE * d3, FAR_ROOT, d[3], d[4]);
  d[5] = d3;
}

// g <- G (g0, g1, g2)
INLINE void transform_line_weight(vfloat (&g)[LINE_POINTS]) {
  const vfloat g0 = g[0], g1 = g[1], g2 = g[2];
  g[0] = AT_ZERO * g0;
  at_roots(AT_NEAR * (g0 + NEAR_SQUARE * g2), AT_NEAR * g1, NEAR_ROOT, g[1], g[2]);
  at_roots(AT_FAR * (g0 + FAR_SQUARE * g2), AT_FAR * g1, FAR_ROOT, g[3], g[4]);
  g[5] = g2;
}

// The first three of s <- G^T s
INLINE void transform_line_sums(vfloat (&s)[LINE_POINTS]) {
  const vfloat near_sum = AT_NEAR * (s[1] + s[2]), near_difference = AT_NEAR * (s[1] - s[2]);
  const vfloat far_sum = AT_FAR * (s[3] + s[4]), far_difference = AT_FAR * (s[3] - s[4]);
  s[0] = AT_ZERO * s[0] + (near_sum + far_sum);
  s[1] = NEAR_ROOT * near_difference + FAR_ROOT * far_difference;
  s[2] = (NEAR_SQUARE * near_sum + FAR_SQUARE * far_sum) + s[5];
}

// points[tile, p, i] <- one slice of B^T d of the tiles first to last of x.
template <bool VOLUME>
void gather_input(const Tiles<VOLUME>& tiles, int slice, const float* x, const float* zeros, int64_t I, int64_t first,
                  int64_t last, float* points) {
  const int64_t pitch = tiles.pitch(I);
  const vfloat far_factor = broadcast(FAR_FACTOR[slice]);
  tiles.for_rows(first, last, [&](const typename Tiles<VOLUME>::Row& row, int64_t number) {
    const float *near_lines[4], *far_lines[4];
    const auto find_line = [&](int64_t z, int64_t y) {
      const int64_t voxel = tiles.line(row.image, z, y);
      return voxel < 0 ? zeros : x + voxel * I;
    };
    for (int y = 0; y < 4; ++y) {
      near_lines[y] = find_line(VOLUME ? row.z - 1 + NEAR[slice] : row.z, row.y - 1 + y);
      far_lines[y] = VOLUME ? find_line(row.z - 1 + FAR[slice], row.y - 1 + y) : nullptr;
    }
    for (int64_t i = 0; i < I; i += CHANNELS) {
      // Transformed along all axes but the last, a ring: tiles share two columns with the next.
      vfloat columns[2 * LINE_VOXELS][LINE_VECTORS][4];
      const auto load_column = [&](int64_t at, vfloat(&column)[LINE_VECTORS][4]) {
        if (at < 0 || at >= tiles.W) {
          for (auto& d : column)
            for (vfloat& value : d) value = vfloat{};
          return;
        }
#pragma GCC unroll 4
        for (int y = 0; y < 4; ++y) {
          __builtin_prefetch(near_lines[y] + (at + PREFETCHED) * I + i);
          if constexpr (VOLUME) __builtin_prefetch(far_lines[y] + (at + PREFETCHED) * I + i);
        }
#pragma GCC unroll 4
        for (int v = 0; v < LINE_VECTORS; ++v) {
          vfloat* d = column[v];
          const int64_t offset = at * I + i + v * WIDTH;
#pragma GCC unroll 4
          for (int y = 0; y < 4; ++y) {
            d[y] = load(near_lines[y] + offset);
            if constexpr (VOLUME) d[y] += far_factor * load(far_lines[y] + offset);
          }
          transform_input(d[0], d[1], d[2], d[3]);
        }
      };
      const auto column = [&](int64_t number) -> auto& { return columns[number & (2 * LINE_VOXELS - 1)]; };
      for (int64_t c = 0; c < 2; ++c) load_column(row.x - 1 + c, column(c));
      for (int64_t t = 0; t < row.n; ++t) {
        for (int64_t c = t * LINE_VOXELS + 2; c < t * LINE_VOXELS + LINE_POINTS; ++c)
          load_column(row.x - 1 + c, column(c));
#pragma GCC unroll 4
        for (int v = 0; v < LINE_VECTORS; ++v) {
          float* p = points + (number + t) * pitch + i + v * WIDTH;
#pragma GCC unroll 4
          for (int y = 0; y < 4; ++y) {
            vfloat d[LINE_POINTS];
#pragma GCC unroll 6
            for (int c = 0; c < LINE_POINTS; ++c) d[c] = column(t * LINE_VOXELS + c)[v][y];
            transform_line_input(d);
#pragma GCC unroll 6
            for (const vfloat& point : d) {
              store(p, point);
              p += I;
            }
          }
        }
      }
    }
  });
}

// What a slice has to do with one of a row's planes of y.
struct Plane {
  int z;
  float factor;
  bool first, last;  // slice that has to do with it
  int64_t lines[2];  // below 0 outside
};

// sums[tile, z, line, voxel, o] <- sums + one slice of A^T points[tile, p, o], beginning with the initial values;
// of the last slice that has to do with a plane they are y.
template <bool VOLUME, class Finish>
void scatter_result(const Tiles<VOLUME>& tiles, int slice, const float* points, int64_t O, int64_t first, int64_t last,
                    const float* initial, float* sums, const Finish& finish) {
  constexpr int DEPTH = Tiles<VOLUME>::OUT_DEPTH;
  const int64_t pitch = tiles.pitch(O);
  tiles.for_rows(first, last, [&](const typename Tiles<VOLUME>::Row& row, int64_t number) {
    Plane planes[DEPTH];
    int count = 0;
    for (int z = 0; z < DEPTH; ++z) {
      const float factor = VOLUME ? RESULT[z][slice] : 1;
      const auto line = [&](int64_t y) { return tiles.line(row.image, row.z + z, y); };
      if (factor != 0 && line(row.y) >= 0)
        planes[count++] = {z, factor, slice == z, slice == z + Tiles<VOLUME>::KERNEL_DEPTH - 1,
                           {line(row.y), line(row.y + 1)}};
    }
    for (int64_t t = 0; t < row.n; ++t) {
      const int64_t x = row.x + LINE_VOXELS * t, voxels = minimum(LINE_VOXELS, tiles.W - x);
      for (int64_t o = 0; o < O; o += WIDTH) {
        for (int line = 0; line < 2; ++line) {
          vfloat m[LINE_POINTS];
          const float* p = points + (number + t) * pitch + o;
#pragma GCC unroll 6
          for (vfloat& point : m) {
            point = transformed_result(p, LINE_POINTS * O, line);
            p += O;
          }
          transform_line_result(m);
          for (const Plane* plane = planes; plane < planes + count; ++plane) {
            if (plane->lines[line] < 0) continue;
            float* sum = sums + (((number + t) * DEPTH + plane->z) * 2 + line) * LINE_VOXELS * O + o;
            const float* before = plane->first ? initial + o : sum;
            const int64_t step = plane->first ? 0 : O;
            vfloat v[LINE_VOXELS];
#pragma GCC unroll 4
            for (int c = 0; c < LINE_VOXELS; ++c) v[c] = load(before + c * step) + plane->factor * m[c];
            if (!plane->last) {
#pragma GCC unroll 4
              for (int c = 0; c < LINE_VOXELS; ++c) store(sum + c * O, v[c]);
              continue;
            }
            const Finish put = finish.from((plane->lines[line] + x) * O + o);
            if (voxels == LINE_VOXELS) {
#pragma GCC unroll 4
              for (int c = 0; c < LINE_VOXELS; ++c) put(c * O, v[c]);
            } else {
              for (int c = 0; c < voxels; ++c) put(c * O, v[c]);
            }
          }
        }
      }
    }
  });
}

// points[tile, p, o] <- one slice of A grad_y, but for signs
template <bool VOLUME>
void gather_gradient(const Tiles<VOLUME>& tiles, int slice, const float* grad_y, int64_t O, int64_t first, int64_t last,
                     float* points) {
  const int64_t pitch = tiles.pitch(O);
  tiles.for_rows(first, last, [&](const typename Tiles<VOLUME>::Row& row, int64_t number) {
    for (int64_t t = 0; t < row.n; ++t) {
      const int64_t x = row.x + LINE_VOXELS * t;
      for (int64_t o = 0; o < O; o += WIDTH) {
        vfloat d[4][LINE_POINTS];
#pragma GCC unroll 2
        for (int line = 0; line < 2; ++line) {
          for (int c = 0; c < LINE_VOXELS; ++c) d[line][c] = vfloat{};
#pragma GCC unroll 2
          for (int z = 0; z < Tiles<VOLUME>::OUT_DEPTH; ++z) {
            const float factor = VOLUME ? GRADIENT[z][slice] : 1;
            const int64_t voxel = tiles.line(row.image, row.z + z, row.y + line);
            if (factor == 0 || voxel < 0) continue;
            const float* in = grad_y + (voxel + x) * O + o;
#pragma GCC unroll 4
            for (int c = 0; c < LINE_VOXELS; ++c)
              if (x + c < tiles.W) d[line][c] += factor * load(in + c * O);
          }
          transform_line_gradient(d[line]);
        }
#pragma GCC unroll 6
        for (int c = 0; c < LINE_POINTS; ++c) transform_gradient(d[0][c], d[1][c], d[2][c], d[3][c]);
        float* p = points + (number + t) * pitch + o;
#pragma GCC unroll 4
        for (int y = 0; y < 4; ++y)
#pragma GCC unroll 6
          for (const vfloat& point : d[y]) {
            store(p, point);
            p += O;
          }
      }
    }
  });
}

using Slice = vfloat[4][LINE_POINTS];

// Run transform on the points along one axis of [4, 4, 6] or [1, 4, 6], for those of the other axes that are in use.
template <class Transform>
INLINE void along_z(Slice* g, const Transform& transform) {
  for (int y = 0; y < 4; ++y)
    for (int x = 0; x < LINE_POINTS; ++x) transform(g[0][y][x], g[1][y][x], g[2][y][x], g[3][y][x]);
}
template <class Transform>
INLINE void along_y(Slice* g, int planes, const Transform& transform) {
  for (int z = 0; z < planes; ++z)
    for (int x = 0; x < LINE_POINTS; ++x) transform(g[z][0][x], g[z][1][x], g[z][2][x], g[z][3][x]);
}
template <class Transform>
INLINE void along_x(Slice* g, int planes, const Transform& transform) {
  for (int z = 0; z < planes; ++z)
    for (int y = 0; y < 3; ++y) transform(g[z][y]);
}

INLINE vfloat& at_point(Slice* g, int p) { return g[p / POINTS][p % POINTS / LINE_POINTS][p % LINE_POINTS]; }

// What there is of a tap among a tile's points before they are transformed.
INLINE vfloat& at_tap(Slice* g, int tap) { return g[tap / 9][tap / 3 % 3][tap % 3]; }

// From one point's matrix to the next: a power of two apart they would share few cache sets.
INLINE int64_t matrix_pitch(const Convolution& a) { return a.I * a.O + CHANNELS; }

// matrices[point, O / COLUMNS, i, COLUMNS] <- G g of a block of CHANNELS i and COLUMNS o, so many as lie next to each other
template <bool VOLUME, int VECTORS>
void transform_weights(const ConvolutionForward& a, Columns<VECTORS>, int64_t block, float* matrices) {
  using T = Tiles<VOLUME>;
  constexpr int64_t COLUMNS = Columns<VECTORS>::COUNT;
  const int64_t blocks = a.I / CHANNELS, first_i = block % blocks * CHANNELS, first_o = block / blocks * COLUMNS;
  for (int64_t i = first_i; i < first_i + CHANNELS; ++i) {
    for (int64_t o = first_o; o < first_o + COLUMNS; o += WIDTH) {
      Slice g[T::SLICES];
      for (int tap = 0; tap < T::TAPS; ++tap) {
        const float* w = a.weight + i * a.in_stride + (a.mirrored ? T::TAPS - 1 - tap : tap) * a.tap_stride;
        for (int lane = 0; lane < WIDTH; ++lane) at_tap(g, tap)[lane] = w[(o + lane) * a.out_stride];
      }
      along_x(g, T::KERNEL_DEPTH, transform_line_weight);
      along_y(g, T::KERNEL_DEPTH, transform_weight);
      if constexpr (VOLUME) along_z(g, transform_weight);
      float* matrix = matrices + (o / COLUMNS * a.I + i) * COLUMNS + o % COLUMNS;
      for (int p = 0; p < T::SLICES * POINTS; ++p) store(matrix + p * matrix_pitch(a), at_point(g, p));
    }
  }
}

template <bool VOLUME, int VECTORS, class Finish>
void forward(const ConvolutionForward& a, Columns<VECTORS> columns, const Finish& finish) {
  using T = Tiles<VOLUME>;
  constexpr int64_t COLUMNS = Columns<VECTORS>::COUNT;
  const T tiles(a, FORWARD);
  const int64_t I = a.I, O = a.O, in_pitch = tiles.pitch(I), out_pitch = tiles.pitch(O);
  Buffer<float> matrices(T::SLICES * POINTS * matrix_pitch(a), Fill::nothing);
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < I / CHANNELS * (O / COLUMNS); ++block)
      transform_weights<VOLUME>(a, columns, block, matrices);
    Buffer<float> in(tiles.chunk * in_pitch), out(tiles.chunk * out_pitch), zeros(a.W * I), initial(O);
    Buffer<float> sums(tiles.chunk * T::OUT_DEPTH * 2 * LINE_VOXELS * O);
    if (a.bias) memcpy(initial, a.bias, O * sizeof(float));
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < tiles.count; first += tiles.chunk) {
      const int64_t last = minimum(tiles.count, first + tiles.chunk);
      for (int slice = 0; slice < T::SLICES; ++slice) {
        gather_input(tiles, slice, a.x, zeros, I, first, last, in);
        for (int p = 0; p < POINTS; ++p)
          for (int64_t o = 0; o < O; o += COLUMNS)
            for (int64_t t = 0; t < last - first; t += ROWS) {
              const float* matrix = matrices + (slice * POINTS + p) * matrix_pitch(a) + o * I;
              float* products = out + t * out_pitch + p * O + o;
              const auto multiply_part = [&](int64_t i, const auto& put) {
                const Rows<1> rows{{in + t * in_pitch + p * I + i}, in_pitch};
                multiply<ROWS>(rows, columns, matrix + i * COLUMNS, 0, minimum(SUM_CHANNELS, I - i), nullptr, out_pitch,
                               put);
              };
              multiply_part(0, [&](int64_t at, vfloat sum) { store(products + at, sum); });
              for (int64_t i = SUM_CHANNELS; i < I; i += SUM_CHANNELS)
                multiply_part(i, [&](int64_t at, vfloat sum) { store(products + at, load(products + at) + sum); });
            }
        scatter_result(tiles, slice, out, O, first, last, initial, sums, finish);
      }
    }
  }
}

template <bool VOLUME, int VECTORS>
void weight_gradient(const ConvolutionWeight& a, Columns<VECTORS> columns) {
  using T = Tiles<VOLUME>;
  const T tiles(a, WEIGHT);
  const int64_t I = a.I, O = a.O, in_pitch = tiles.pitch(I), out_pitch = tiles.pitch(O);
  const int64_t parts = (tiles.count + SUM_TILES - 1) / SUM_TILES, slice_sums = POINTS * I * O;
  Buffer<double> total(T::SLICES * slice_sums);  // [point, I, O]
#pragma omp parallel num_threads(a.threads)
  {
    Buffer<float> sums(slice_sums), in(tiles.chunk * in_pitch), out(tiles.chunk * out_pitch), zeros(a.W * I);
#pragma omp for ordered schedule(dynamic, 1)
    for (int64_t task = 0; task < parts * T::SLICES; ++task) {
      const int64_t part = task / T::SLICES, end = minimum(tiles.count, (part + 1) * SUM_TILES);
      const int slice = int(task % T::SLICES);
      memset(sums, 0, slice_sums * sizeof(float));
      for (int64_t first = part * SUM_TILES; first < end; first += tiles.chunk) {
        const int64_t last = minimum(end, first + tiles.chunk);
        gather_input(tiles, slice, a.x, zeros, I, first, last, in);
        gather_gradient(tiles, slice, a.grad_y, O, first, last, out);
        for (int p = 0; p < POINTS; ++p)
          for (int64_t o = 0; o < O; o += Columns<VECTORS>::COUNT)
            for (int64_t i = 0; i < I; i += SUM_ROWS)
              add_products(columns, in + p * I + i, in_pitch, out + p * O + o, out_pitch, last - first, sums + (p * I + i) * O + o,
                           O);
      }
      // In the order of the tasks, so that any number of threads gives the same result.
#pragma omp ordered
      for (int64_t i = 0; i < slice_sums; ++i) total[slice * slice_sums + i] += sums[i];
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < I; ++i) {
      for (int64_t o = 0; o < O; o += WIDTH) {
        Slice g[T::SLICES];
        for (int p = 0; p < T::SLICES * POINTS; ++p)
          for (int lane = 0; lane < WIDTH; ++lane) at_point(g, p)[lane] = float(total[(p * I + i) * O + o + lane]);
        if constexpr (VOLUME) along_z(g, transform_sums);
        along_y(g, T::KERNEL_DEPTH, transform_sums);
        along_x(g, T::KERNEL_DEPTH, transform_line_sums);
        for (int tap = 0; tap < T::TAPS; ++tap) {
          float* w = a.grad_weight + i * a.in_stride + tap * a.tap_stride;
          for (int lane = 0; lane < WIDTH; ++lane) w[(o + lane) * a.out_stride] = at_tap(g, tap)[lane];
        }
      }
    }
  }
}

}  // namespace

void convolution_forward(const ConvolutionForward& a) {
  if (a.I % CHANNELS) return narrow_convolution_forward(a);
  with_finish(a.y, a.B * a.D * a.H * a.W * a.O, a.negative_slope, nullptr, [&](const auto& finish) {
    with_columns(a.O, [&](auto columns) {
      a.volume ? forward<true>(a, columns, finish) : forward<false>(a, columns, finish);
    });
  });
}

void convolution_weight(const ConvolutionWeight& a) {
  with_columns(a.O, [&](auto columns) {
    a.volume ? weight_gradient<true>(a, columns) : weight_gradient<false>(a, columns);
  });
}

}  // namespace semiseg::SEMISEG_LEVEL
