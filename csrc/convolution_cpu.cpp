// y[b, s, o] = bias[o] + sum over i and the taps t in {-1, 0, 1}^axes of weight[o, i, t] x[b, s + t, i],  x = 0 outside
// grad_x is the same of grad_y, taps mirrored, channels exchanged; grad_weight[o, i, t] = sum_bs grad_y[b, s, o] x[b, s + t, i]
//
// Winograd's F(2, 3) along every axis: two neighbouring results are A^T (G g * B^T d) of the four d they read, with
//   B^T d = (d0 - d2, d1 + d2, d2 - d1, d1 - d3)
//   G g   = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)
//   A^T m = (m0 + m1 + m2, m1 - m2 - m3)
// 4 products for 6: in a volume, 64 for the 216 of a tile of 2 x 2 x 2 voxels. The products of all channels are matrix
// products, one for each of a tile's 4^axes points. The weight's gradient is the adjoint, G^T sum (A grad_y * B^T d).
// A volume's points are computed slice by slice, 4 x 4 of them: each has to do with two planes of x, and one or two of y.
// Source: A. Lavin, S. Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.
#include "kernels.h"
#include "matrix_blocks.h"
#include "tile.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

constexpr int POINTS = 16;                      // of a slice, 4 x 4
constexpr int LINE_VECTORS = CHANNELS / WIDTH;  // of the channels that are transformed together
constexpr int64_t SCRATCH_BYTES = 192 << 10;    // of a thread, for most numbers of channels
constexpr int64_t FEWEST = 24, MOST = 96;       // tiles of a chunk, multiples of ROWS
constexpr int64_t SUM_TILES = 1024;             // that the weight's gradient sums in float32
constexpr int64_t PREFETCHED = 4;               // voxels ahead

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

  explicit Tiles(const Convolution& a) : D(a.D), H(a.H), W(a.W) {
    depth = VOLUME ? (D + 1) / 2 : D;
    height = (H + 1) / 2;
    width = (W + 1) / 2;
    count = a.B * depth * height * width;
    const int64_t affordable = SCRATCH_BYTES / (POINTS * (a.I + a.O) * int64_t(sizeof(float)));
    chunk = maximum(FEWEST, minimum(MOST, affordable / ROWS * ROWS));
  }

  // Points a power of two apart would share few cache sets.
  int64_t pitch(int64_t channels) const { return chunk * channels + CHANNELS; }

  struct Row {               // tiles that follow each other along the last axis
    int64_t image, z, y, x;  // the first voxel of the first tile
    int64_t n;
  };

  INLINE Row row(int64_t tile, int64_t last) const {
    const int64_t line = tile / width, x = tile - line * width;
    const int64_t plane = line / height, y = line - plane * height;
    const int64_t image = plane / depth, z = plane - image * depth;
    return {image, z * OUT_DEPTH, y * 2, x * 2, minimum(width - x, last - tile)};
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

// d <- B^T d
INLINE void transform_input(vfloat& d0, vfloat& d1, vfloat& d2, vfloat& d3) {
  const vfloat m0 = d0 - d2, m1 = d1 + d2, m2 = d2 - d1, m3 = d1 - d3;
  d0 = m0, d1 = m1, d2 = m2, d3 = m3;
}

// m0, m1 <- A^T m
INLINE void transform_result(vfloat& m0, vfloat& m1, vfloat m2, vfloat m3) {
  const vfloat y0 = m0 + (m1 + m2), y1 = (m1 - m2) - m3;
  m0 = y0, m1 = y1;
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

// points[p, tile, i] <- one slice of B^T d of the tiles first to last of x.
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
      vfloat columns[4][LINE_VECTORS][4];  // transformed along all axes but the last, which tiles share
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
      load_column(row.x - 1, columns[0]);
      load_column(row.x, columns[1]);
      for (int64_t t = 0; t < row.n; ++t) {
        const int left = t % 2 ? 2 : 0, right = left ^ 2;
        load_column(row.x + 2 * t + 1, columns[right]);
        load_column(row.x + 2 * t + 2, columns[right + 1]);
#pragma GCC unroll 4
        for (int v = 0; v < LINE_VECTORS; ++v) {
          float* p = points + (number + t) * I + i + v * WIDTH;
#pragma GCC unroll 4
          for (int y = 0; y < 4; ++y) {
            vfloat d0 = columns[left][v][y], d1 = columns[left + 1][v][y];
            vfloat d2 = columns[right][v][y], d3 = columns[right + 1][v][y];
            transform_input(d0, d1, d2, d3);
            store(p, d0);
            store(p + pitch, d1);
            store(p + 2 * pitch, d2);
            store(p + 3 * pitch, d3);
            p += 4 * pitch;
          }
        }
      }
    }
  });
}

// y <- y + one slice of A^T points[p, tile, o]; the first slice that has to do with a plane sets it, with the bias.
template <bool VOLUME>
void scatter_result(const Tiles<VOLUME>& tiles, int slice, const float* points, int64_t O, int64_t first, int64_t last,
                    const float* bias, float* y) {
  const int64_t pitch = tiles.pitch(O);
  tiles.for_rows(first, last, [&](const typename Tiles<VOLUME>::Row& row, int64_t number) {
    for (int z = 0; z < Tiles<VOLUME>::OUT_DEPTH; ++z) {
      const float factor = VOLUME ? RESULT[z][slice] : 1;
      if (factor == 0) continue;
      const bool sets = slice == z;
      const int64_t lines[2] = {tiles.line(row.image, row.z + z, row.y), tiles.line(row.image, row.z + z, row.y + 1)};
      if (lines[0] < 0) continue;
      for (int64_t t = 0; t < row.n; ++t) {
        const int64_t x = row.x + 2 * t;
        for (int64_t o = 0; o < O; o += WIDTH) {
          const float* p = points + (number + t) * O + o;
          vfloat m[4][2];
#pragma GCC unroll 4
          for (int line = 0; line < 4; ++line) {
            m[line][0] = load(p), m[line][1] = load(p + pitch);
            transform_result(m[line][0], m[line][1], load(p + 2 * pitch), load(p + 3 * pitch));
            p += 4 * pitch;
          }
#pragma GCC unroll 2
          for (int at = 0; at < 2; ++at) {
            transform_result(m[0][at], m[1][at], m[2][at], m[3][at]);
            if (x + at >= tiles.W) continue;
#pragma GCC unroll 2
            for (int line = 0; line < 2; ++line) {
              if (lines[line] < 0) continue;
              float* out = y + (lines[line] + x + at) * O + o;
              const vfloat before = !sets ? load(out) : bias ? load(bias + o) : vfloat{};
              store(out, before + factor * m[line][at]);
            }
          }
        }
      }
    }
  });
}

// points[p, tile, o] <- one slice of A grad_y, but for signs
template <bool VOLUME>
void gather_gradient(const Tiles<VOLUME>& tiles, int slice, const float* grad_y, int64_t O, int64_t first, int64_t last,
                     float* points) {
  const int64_t pitch = tiles.pitch(O);
  tiles.for_rows(first, last, [&](const typename Tiles<VOLUME>::Row& row, int64_t number) {
    for (int64_t t = 0; t < row.n; ++t) {
      const int64_t x = row.x + 2 * t;
      for (int64_t o = 0; o < O; o += WIDTH) {
        vfloat d[POINTS];
#pragma GCC unroll 2
        for (int line = 0; line < 2; ++line) {
          vfloat* values = d + line * 4;
          values[0] = values[1] = vfloat{};
#pragma GCC unroll 2
          for (int z = 0; z < Tiles<VOLUME>::OUT_DEPTH; ++z) {
            const float factor = VOLUME ? GRADIENT[z][slice] : 1;
            const int64_t voxel = tiles.line(row.image, row.z + z, row.y + line);
            if (factor == 0 || voxel < 0) continue;
            values[0] += factor * load(grad_y + (voxel + x) * O + o);
            if (x + 1 < tiles.W) values[1] += factor * load(grad_y + (voxel + x + 1) * O + o);
          }
          transform_gradient(values[0], values[1], values[2], values[3]);
        }
#pragma GCC unroll 4
        for (int at = 0; at < 4; ++at) transform_gradient(d[at], d[4 + at], d[8 + at], d[12 + at]);
        float* p = points + (number + t) * O + o;
#pragma GCC unroll 16
        for (int point = 0; point < POINTS; ++point) store(p + point * pitch, d[point]);
      }
    }
  });
}

// Runs transform(p0, p1, p2, p3) on the four points along one axis of [4, 4, 4] or [4, 4], for n of each other axis.
template <class Transform>
INLINE void along_z(vfloat* p, const Transform& transform) {
  for (int yx = 0; yx < 16; ++yx) transform(p[yx], p[16 + yx], p[32 + yx], p[48 + yx]);
}
template <class Transform>
INLINE void along_y(vfloat* p, int planes, const Transform& transform) {
  for (int z = 0; z < planes; ++z)
    for (int x = 0; x < 4; ++x) {
      vfloat* q = p + z * 16 + x;
      transform(q[0], q[4], q[8], q[12]);
    }
}
template <class Transform>
INLINE void along_x(vfloat* p, int planes, const Transform& transform) {
  for (int z = 0; z < planes; ++z)
    for (int y = 0; y < 3; ++y) {
      vfloat* q = p + z * 16 + y * 4;
      transform(q[0], q[1], q[2], q[3]);
    }
}

// The place of a tap among a tile's points before they are transformed.
INLINE int place(int tap) { return tap / 9 * 16 + tap / 3 % 3 * 4 + tap % 3; }

// matrices[point, O / COLUMNS, i, COLUMNS] <- G g of the channel i
template <bool VOLUME>
void transform_weights(const ConvolutionForward& a, int64_t i, float* matrices) {
  using T = Tiles<VOLUME>;
  for (int64_t o = 0; o < a.O; o += WIDTH) {
    vfloat g[T::SLICES * POINTS];
    for (int tap = 0; tap < T::TAPS; ++tap) {
      const float* w = a.weight + i * a.in_stride + (a.mirrored ? T::TAPS - 1 - tap : tap) * a.tap_stride;
      for (int lane = 0; lane < WIDTH; ++lane) g[place(tap)][lane] = w[(o + lane) * a.out_stride];
    }
    along_x(g, T::KERNEL_DEPTH, transform_weight);
    along_y(g, T::KERNEL_DEPTH, transform_weight);
    if constexpr (VOLUME) along_z(g, transform_weight);
    float* matrix = matrices + (o / COLUMNS * a.I + i) * COLUMNS + o % COLUMNS;
    for (int p = 0; p < T::SLICES * POINTS; ++p) store(matrix + p * a.I * a.O, g[p]);
  }
}

template <bool VOLUME>
void forward(const ConvolutionForward& a) {
  using T = Tiles<VOLUME>;
  const T tiles(a);
  const int64_t I = a.I, O = a.O, in_pitch = tiles.pitch(I), out_pitch = tiles.pitch(O);
  Buffer<float> matrices(T::SLICES * POINTS * I * O, Fill::nothing);
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < I; ++i) transform_weights<VOLUME>(a, i, matrices);
    Buffer<float> in(POINTS * in_pitch), out(POINTS * out_pitch), zeros(a.W * I);
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < tiles.count; first += tiles.chunk) {
      const int64_t last = minimum(tiles.count, first + tiles.chunk);
      for (int slice = 0; slice < T::SLICES; ++slice) {
        gather_input(tiles, slice, a.x, zeros, I, first, last, in);
        for (int p = 0; p < POINTS; ++p)
          for (int64_t o = 0; o < O; o += COLUMNS)
            for (int64_t t = 0; t < last - first; t += ROWS) {
              const float* rows = in + p * in_pitch + t * I;
              multiply<ROWS, 1>(&rows, I, matrices + ((slice * POINTS + p) * O + o) * I, 0, I, nullptr,
                                out + p * out_pitch + t * O + o, O);
            }
        scatter_result(tiles, slice, out, O, first, last, a.bias, a.y);
      }
    }
  }
}

template <bool VOLUME>
void weight_gradient(const ConvolutionWeight& a) {
  using T = Tiles<VOLUME>;
  const T tiles(a);
  const int64_t I = a.I, O = a.O, in_pitch = tiles.pitch(I), out_pitch = tiles.pitch(O);
  const int64_t parts = (tiles.count + SUM_TILES - 1) / SUM_TILES, slice_sums = POINTS * I * O;
  Buffer<double> total(T::SLICES * slice_sums);  // [point, I, O]
#pragma omp parallel num_threads(a.threads)
  {
    Buffer<float> sums(slice_sums), in(POINTS * in_pitch), out(POINTS * out_pitch), zeros(a.W * I);
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
          for (int64_t o = 0; o < O; o += COLUMNS)
            for (int64_t i = 0; i < I; i += SUM_ROWS)
              add_products(in + p * in_pitch + i, I, out + p * out_pitch + o, O, last - first, sums + (p * I + i) * O + o,
                           O);
      }
      // In the order of the tasks, so that any number of threads gives the same result.
#pragma omp ordered
      for (int64_t i = 0; i < slice_sums; ++i) total[slice * slice_sums + i] += sums[i];
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < I; ++i) {
      for (int64_t o = 0; o < O; o += WIDTH) {
        vfloat g[T::SLICES * POINTS];
        for (int p = 0; p < T::SLICES * POINTS; ++p)
          for (int lane = 0; lane < WIDTH; ++lane) g[p][lane] = float(total[(p * I + i) * O + o + lane]);
        if constexpr (VOLUME) along_z(g, transform_sums);
        along_y(g, T::KERNEL_DEPTH, transform_sums);
        along_x(g, T::KERNEL_DEPTH, transform_sums);
        for (int tap = 0; tap < T::TAPS; ++tap) {
          float* w = a.grad_weight + i * a.in_stride + tap * a.tap_stride;
          for (int lane = 0; lane < WIDTH; ++lane) w[(o + lane) * a.out_stride] = g[place(tap)][lane];
        }
      }
    }
  }
}

}  // namespace

void convolution_forward(const ConvolutionForward& a) { a.volume ? forward<true>(a) : forward<false>(a); }

void convolution_weight(const ConvolutionWeight& a) { a.volume ? weight_gradient<true>(a) : weight_gradient<false>(a); }

}  // namespace semiseg::SEMISEG_LEVEL
